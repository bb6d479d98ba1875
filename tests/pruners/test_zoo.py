"""Settings of the published methods beyond their defaults: the same oracles, and what each refuses."""

from dataclasses import replace

import pytest
import torch
from conftest import KEEP, PATCHES, TEXTS, close, images, inputs, llava, make_timm, vision_model
from core.test_cost import _encoder, agree, counted

import ivtp
from ivtp.core.flops import Layers, Shape, cost
from ivtp.core.reduces import Merge
from ivtp.core.selects import max_min_order
from ivtp.core.tokens import Tokens
from ivtp.pruners.ats import Sampled
from ivtp.pruners.cdpruner import greedy_dpp_order
from ivtp.pruners.prumerge import Clusters
from ivtp.pruners.resolution import Cells, cells, middles
from ivtp.pruners.sparsevlm import density_peaks, kept_of, recycled
from ivtp.pruners.tome import merges_per_layer

VARIANTS = [
    ("ats", {"group": 1}),
    ("cdpruner", {"negate": False}),
    ("dart", {"image_pivots": 1, "text_pivots": 2, "layer": 4}),
    ("downsample", {}),
    ("evit", {"fuse": False}),
    ("hiprune", {"alpha": 0.9, "object_layer": 1, "keep": 9}),
    ("pdrop", {"layers": [1, 5]}),
    ("prumerge", {"adaptive": True, "neighbours": 3}),
    ("prumerge_plus", {"adaptive": True, "keep": 11}),
    ("sparsevlm", {"recycle": False}),
    ("sparsevlm", {"recycle": False, "rank": True, "scale": 1.0}),
    ("sparsevlm", {"rank": True, "scale": 1.0, "bias": 1.0, "keep": 7}),
    ("tome", {"schedule": "constant"}),
    ("tome", {"schedule": "decreasing", "keep": 9}),
    ("vispruner", {"important_ratio": 1.0}),
    ("vispruner", {"important_ratio": 0.25, "keep": 13}),
    ("visionzip", {"contextual": 3}),
    ("vscan", {"vision_keep": 20, "local_layer": 0, "layer": 3}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in settings.items())}" for name, settings in VARIANTS]


def plan_for(name, settings, model):
    return ivtp.load_pruner(name, ivtp.shape_of(model), **{"keep": KEEP, **settings})


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=IDS)
def test_a_prompt_is_pruned_the_same_in_any_batch_at_the_cost_that_was_foretold(name, settings):
    model, batch = llava(), inputs()
    plan = plan_for(name, settings, model)

    def answer(batch):
        # DART reads keys after RoPE, so it must not matter where the padding lets positions begin.
        return model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp_min(0)).logits[:, -1]

    with ivtp.prune(model, plan) as run:
        together = answer(batch)
        cuts = [*run.trace.vision, *run.trace.language]
        for i, text in enumerate(TEXTS):
            close(answer(inputs([text]))[0], together[i], 3e-5)
            for alone, batched in zip([*run.trace.vision, *run.trace.language], cuts, strict=True):
                assert torch.equal(alone.valid[0], batched.valid[i])
                assert torch.equal(alone.position[0][alone.valid[0]], batched.position[i][batched.valid[i]])
    assert cuts[-1].position.shape[1] == plan.final

    batch = inputs(TEXTS[1:2])
    del batch["attention_mask"]
    words = batch["input_ids"].shape[1] - PATCHES
    read = len(_encoder().tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]) + 2
    expected = cost(ivtp.shape_of(model), plan, words, read, streamed=True)
    agree(counted(model, plan, lambda: model(**batch), "language"), expected)


def test_adaptive_methods_keep_a_different_number_per_image():
    model, pixels = vision_model("clip_sdpa"), images(3)
    for name, settings in (("ats", {}), ("prumerge", {"adaptive": True, "keep": 11})):
        with ivtp.prune(model, plan_for(name, {"keep": 11, **settings}, model)) as run:
            model(pixels)
        counts = run.vision[-1].valid.sum(1)
        assert 1 <= counts.min() < 11, name
        # What is there costs less than what might have been.
        plan, shape = plan_for(name, {"keep": 11, **settings}, model), ivtp.shape_of(model)
        i = int(counts.argmin())
        kept = plan.keeping([int(cut.valid[i].sum()) for cut in run.vision])
        assert kept.final == counts[i]
        assert cost(shape, kept).total < cost(shape, plan).total


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("vispruner", {"keep": 10}, "at least 8"),
        ("visionzip", {"keep": 5, "contextual": 5}, "below keep=5"),
        ("visionzip", {"keep": 1}, "contextual=1"),
        ("sparsevlm", {"keep": 100, "schedule": "published"}, "64, 96, 128, 192"),
        ("sparsevlm", {"keep": 3, "layers": [1]}, "recycle=false"),
        ("sparsevlm", {"keep": 9, "layers": [40]}, "between 0 and"),
        ("sparsevlm", {"keep": 9, "schedule": "table"}, "ratio, published"),
        ("evit", {"keep": 1}, "at least 2 tokens"),
        ("prumerge", {"keep": 1}, "at least 2 tokens"),
        ("dart", {"keep": 3}, "4 image pivots"),
        ("dart", {"keep": 9, "layer": 0}, "between 1 and"),
        ("fastv", {"keep": 9, "layer": 32}, "between 1 and 31"),
        ("pdrop", {"keep": 9, "layers": [32]}, "between 1 and 31"),
        ("pdrop", {"keep": 9, "layers": 5}, "list of whole numbers"),
        ("pdrop", {"keep": 9, "layers": [5, 5]}, "rising order"),
        ("tome", {"keep": 9, "group": "all"}, "at most halve"),
        ("tome", {"keep": 9, "schedule": "falling"}, "ratio, constant, decreasing"),
        ("hiprune", {"keep": 9, "alpha": 1.5}, "between 0 and 1"),
        ("hiprune", {"keep": 9, "object_layer": 23}, "between 0 and 22"),
        ("vscan", {"keep": 9, "vision_keep": 5}, "between keep=9"),
        ("downsample", {"keep": 29}, "28, 30"),
    ],
)
def test_a_budget_that_a_method_cannot_meet_is_refused_in_words(name, settings, says):
    sizes = Layers(24, 1024, 4096, 16, 16, 64, 2)
    shape = Shape(
        sizes, 576, 588, projector_in=1024, language=Layers(32, 4096, 11008, 32, 32, 128, 3), vocabulary=32000
    )
    with pytest.raises(ValueError, match=says) as error:
        ivtp.load_pruner(name, shape, **settings)
    assert "\n" not in str(error.value)


def test_published_tables_of_sparsevlm():
    shape = Shape(Layers(24, 8, 8, 1, 1, 8, 2), 576, 588, language=Layers(32, 8, 8, 1, 1, 8, 3))
    for keep, kept in ((192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))):
        cuts = ivtp.load_pruner("sparsevlm", shape, keep=keep, schedule="published").language.schedule
        assert [cut.layer for cut in cuts] == [2, 6, 15]
        before = 576
        for cut, count in zip(cuts, kept, strict=True):
            assert cut.keep == count + recycled(before - count)[1]
            assert kept_of(cut.keep, before) == count
            before = cut.keep


def test_every_budget_is_met_with_the_clusters_it_makes():
    for tokens in (7, 25, 144):
        for total in range(2 + recycled(tokens)[1], tokens):
            kept = kept_of(total, tokens)
            assert kept + recycled(tokens - kept)[1] == total


def test_tome_s_published_schedules_meet_the_budget():
    shape = Shape(Layers(24, 8, 8, 1, 1, 8, 2), 576, 588)
    constant = [cut.keep for cut in ivtp.load_pruner("tome", shape, keep=64, schedule="constant").vision.schedule]
    assert constant[:2] == [554, 532]
    assert constant[-1] == 64
    falling = [cut.keep for cut in ivtp.load_pruner("tome", shape, keep=64, schedule="decreasing").vision.schedule]
    assert falling[-1] == 64
    assert 576 - falling[0] > falling[-2] - falling[-1]
    assert merges_per_layer([3, 2], 4) == [3, 2, 0, 0]


def tokens_of(x):
    place = torch.arange(x.shape[1])[None]
    return Tokens.of(x, visual=place >= 0, reference=place == 0)


def test_max_min_is_farthest_point_sampling_and_never_repeats():
    x = torch.randn(3, 17, 5)
    x[:, 9:] = x[:, :8]  # more tokens to keep than different ones
    order = max_min_order(x, 13)
    for sample, chosen in zip(x.double(), order.tolist(), strict=True):
        assert len(set(chosen)) == 13
        unit = sample / sample.norm(dim=-1, keepdim=True)
        distance = 1 - unit @ unit.T
        for step in range(1, 8):
            nearest = distance[:, chosen[:step]].amin(1)
            assert nearest[chosen[step]] >= nearest.max() - 1e-6


def test_the_greedy_process_picks_what_adds_most_to_the_determinant():
    x, quality = torch.randn(2, 9, 6), torch.rand(2, 9) + 0.1
    order = greedy_dpp_order(quality, x, 8)  # of rank 6: two more are filled up
    for sample, q, chosen in zip(x.double(), quality.double(), order.tolist(), strict=True):
        assert len(set(chosen)) == 8
        unit = sample / sample.norm(dim=-1, keepdim=True)
        kernel = q[:, None] * (unit @ unit.T) * q
        for step in range(6):
            gains = [
                -1.0 if i in chosen[:step] else float(torch.det(kernel[[*chosen[:step], i]][:, [*chosen[:step], i]]))
                for i in range(9)
            ]
            assert gains[chosen[step]] >= max(gains) - 1e-9


def test_clusters_of_a_padded_batch_are_those_of_its_samples():
    x = torch.randn(3, 11, 4)
    counts, clusters = torch.tensor([11, 7, 3]), torch.tensor([3, 2, 1])
    real = torch.arange(11)[None] < counts[:, None]
    centres, cluster = density_peaks(x, clusters, real)
    for i, (n, k) in enumerate(zip(counts.tolist(), clusters.tolist(), strict=True)):
        alone = density_peaks(x[i : i + 1, :n], clusters[i : i + 1], real[i : i + 1, :n])
        assert torch.equal(alone[0][0, :k], centres[i, :k])
        assert torch.equal(alone[1][0], cluster[i, :n])
        assert int(cluster[i, :n].max()) == k - 1


def test_sampling_never_takes_the_lowest_score_and_follows_its_shape():
    flat, peaked = torch.linspace(1, 1.1, 20), torch.cat([torch.full((19,), 1e-4), torch.ones(1)])
    scores = torch.stack([flat / flat.sum(), peaked / peaked.sum()])
    selection = Sampled()(scores, None, 10, tokens_of(scores[:, :, None]))
    assert selection.valid.sum(1).tolist()[0] == 10
    assert selection.valid.sum(1).tolist()[1] < 5
    assert 0 not in selection.index[0].tolist()


def test_fixed_budgets_of_prumerge_are_met_with_different_centres():
    scores = torch.rand(2, 30).softmax(1)
    for spaced in (False, True):
        centres, count = Clusters(False, spaced).centres(scores, torch.ones(2, 30, dtype=torch.bool), 11)
        assert count.tolist() == [11, 11]
        assert all(len(set(row)) == 11 for row in centres.tolist())


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (5, 7), (7, 3), (1, 9)])
def test_cells_share_the_grid_evenly_and_hold_their_middles(rows, columns):
    for keep in range(1, rows * columns + 1):
        cell = cells(rows, columns, keep)
        sizes = torch.bincount(torch.tensor(cell), minlength=keep)
        assert len(cell) == rows * columns
        assert sizes.min() >= 1
        assert len(sizes) == keep
        middle = middles(cell, columns, keep)
        assert [cell[place] for place in middle] == list(range(keep))


def test_pooling_to_a_third_is_plain_average_pooling():
    x = torch.randn(2, 36, 5)
    tokens = tokens_of(x)
    out = tokens.keep(Cells(6, 6, True)(None, None, 4, tokens), Merge(), None)
    pooled = torch.nn.functional.avg_pool2d(x.transpose(1, 2).view(2, 5, 6, 6), 3).flatten(2).transpose(1, 2)
    close(out.x, pooled)


@pytest.mark.parametrize(
    "backbone",
    [
        "timm_cls",
        "timm_avg",
        "timm_registers",
        "timm_eva02",
        "timm_eva_mixed",
        "timm_eva_dinov3",
        "clip_sdpa",
        "siglip_sdpa",
        "dinov2_sdpa",
    ],
)
def test_a_small_image_runs_through_the_tower_as_such(backbone):
    """At the size of the grid that is left, the model's own way to resize its position embeddings."""
    model, pixels = vision_model(backbone), images(2)
    plan = plan_for("downsample", {"keep": 9}, model)
    assert plan.image == (3, 3)
    small = torch.nn.functional.interpolate(pixels, (21, 21), mode="bicubic", antialias=True)
    with ivtp.prune(model, plan) as run:
        actual = model.forward_features(pixels) if backbone.startswith("timm") else model(pixels).last_hidden_state
    if backbone.startswith("timm"):
        resized = make_timm(backbone)
        resized.set_input_size(img_size=(21, 21))
        close(actual, resized.forward_features(small))
        # Whole images are read as before, with the rotary positions of their own grid.
        assert torch.equal(model.forward_features(pixels), make_timm(backbone).forward_features(pixels))
        assert model.patch_embed.strict_img_size
        assert not model.dynamic_img_size
    else:
        asked = {} if backbone.startswith("dinov2") else {"interpolate_pos_encoding": True}  # which it does by itself
        expected = model(small, **asked).last_hidden_state
        close(actual, expected)
    assert run.vision[-1].position[0].tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24]


def test_a_plan_says_what_it_reads():
    model = llava()
    plan = plan_for("cdpruner", {}, model)
    assert plan.needs_guide
    assert plan.reads_relevance
    assert not replace(plan, language=None).needs_guide
    assert not plan_for("fastv", {}, model).needs_guide
    assert plan_for("sparsevlm", {}, model).reference == "raters"
    assert not plan_for("sparsevlm", {}, model).appends_reference
    assert plan_for("pdrop", {}, model).language.needs == "next"
    assert plan_for("hiprune", {}, model).vision.needs == (1, 5)
