"""Encoders through the whole command: outcomes, metrics, going on after a stop, tables, what fits what."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.running import by_label, lines, one_line, outcomes, run
from PIL import Image

from ivtp.backbones.loading.encoders import Encoder
from ivtp.core.plan import Plan
from ivtp.data.images import ImageCollate, Images
from ivtp.evaluation.classification import Classify

EMOJI = ("model=tiny_clip", "data=emoji", "data.size=4", "data.background=photo", "pruner=rollout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("emoji")
    assert run(*EMOJI, output=output) == 0
    return output / "run"


def test_outcomes_have_the_fields_of_answers_and_the_metrics_are_theirs(folder):
    """So that tables, paired statistics, the page and W&B need to know nothing of encoders."""
    for record in lines(folder / "results.jsonl"):
        found = outcomes(folder, record)
        assert len(found) == 20 and all(o["correct"] == (o["prediction"] == o["answer"]) for o in found)
        assert record["metrics"]["accuracy"]["mean"] == pytest.approx(sum(o["correct"] for o in found) / 20)
        assert record["metrics"]["top5"]["mean"] == pytest.approx(sum(o["top5"] for o in found) / 20)
        assert all(o["top5"] or not o["correct"] for o in found)
        assert record["prompt"].startswith("{} | a {}") and record["model"]["library"] == "transformers"
    pruned = outcomes(folder, by_label(folder)["rollout"])
    assert all(len(o["kept"]) == 36 and o["target_hit"] is not None for o in pruned)
    assert sum(o["target_share"] for o in pruned) / 20 > 0.12, (
        "a trained tower attends to the drawing, 6 % of the image"
    )


def test_the_table_and_the_page_show_them(folder):
    table = (folder / "table.md").read_text()
    assert "| top5 |" in table and "top5: the right class is among the five likeliest" in table
    page = (folder / "report.html").read_text()
    assert "which class ?" in page and "top5" in page
    for name in ("accuracy_flops.png", "kept_tokens.png"):
        assert Image.open(folder / name).size[0] > 200


def test_a_stopped_run_goes_on_at_the_image_where_it_was(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    record = by_label(copy)["rollout"]
    path = copy / "outcomes" / f"{record['key']}.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:13]
    path.write_text("".join(kept))
    rows = [
        line for line in (copy / "results.jsonl").read_text().splitlines(keepends=True) if record["key"] not in line
    ]
    (copy / "results.jsonl").write_text("".join(rows))
    assert run(*EMOJI, output=tmp_path) == 0
    assert path.read_text().splitlines(keepends=True)[:13] == kept
    assert by_label(copy)["rollout"]["metrics"] == record["metrics"]


def test_the_size_of_a_batch_changes_no_outcome(folder, tmp_path):
    assert run(*EMOJI, "trainer.batch_size=3", output=tmp_path) == 0
    for label in ("unpruned", "rollout"):
        before, after = (outcomes(path, by_label(path)[label]) for path in (folder, tmp_path / "run"))
        assert before == after


def test_flops_of_an_image_are_counted_as_they_are_foretold(tmp_path):
    assert run(*EMOJI, "measure=true", "data.limit=3", "viewer=0", output=tmp_path) == 0
    for record in lines(tmp_path / "run" / "results.jsonl"):
        assert record["counted"]["closed"] == record["counted"]["counted"]
        assert record["counted"]["counted"]["vision"] > 0 and set(record["speed"]["parts"]) <= {"vision", "pruner"}


def test_accuracies_are_torchmetrics_own(monkeypatch):
    """Top-1 and top-5 of made-up logits, against the definition; a class more than five is needed for top-5."""
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    labels = [3, 0, 5, 1, 1, 2, 4]
    for classes in (6, 5):
        module, found = made(logits[:, :classes], [label % classes for label in labels], classes)
        ranks = [
            (row > row[label % classes]).sum().item() for row, label in zip(logits[:, :classes], labels, strict=True)
        ]
        assert module.accuracy.compute() == pytest.approx(sum(rank == 0 for rank in ranks) / 7)
        assert [o["correct"] for o in found] == [rank == 0 for rank in ranks]
        if classes > 5:
            assert module.top5.compute() == pytest.approx(sum(rank < 5 for rank in ranks) / 7)
            assert [o["top5"] for o in found] == [rank < 5 for rank in ranks]
        else:
            assert module.top5 is None and {o["top5"] for o in found} == {None}


def made(logits, labels, classes):
    """The module after one batch of a timm model whose classifier gives these logits."""
    from conftest import make_timm

    model = make_timm("timm_cls")
    data = Images(
        [str(i) for i in range(7)],
        labels,
        [f"class {i}" for i in range(classes)],
        lambda i: Image.new("RGB", (35, 35), (i, i, i)),
        lambda i: torch.zeros(25, dtype=torch.bool),
        str,
    )
    encoder = Encoder(
        model, lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 3, 35, 35)}, model
    )
    encoder._classify = lambda pixels: logits
    module = Classify(encoder, data.classes, Plan())
    return module, module.test_step(ImageCollate(encoder)([data[i] for i in range(7)]), 0)["outcomes"]


def test_it_trains_nothing():
    from conftest import make_timm

    module = Classify(Encoder(make_timm("timm_cls"), None, None), ["a", "b"], Plan())
    with pytest.raises(RuntimeError, match="trains nothing"):
        module.training_step()
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=tiny_clip", "pruner=rollout"], "data=scenes2 asks questions"),
        (["model=tiny", "data=emoji"], "data=emoji asks nothing"),
        (
            ["model=tiny_clip", "data=emoji", "pruner=cdpruner"],
            "prunes inside a language model, but this model has none",
        ),
        (["model=tiny_clip", "data=emoji", "pruner=ivtp"], "use ivtp_v"),
        (["model=tiny_clip", "data=emoji", "pruner=rollout", "model.templates=[number]"], "template 'number'"),
        (
            ["model=deit_small", "model.pretrained=false", "data=emoji", "pruner=topk"],
            "the model's classifier has 1000",
        ),
        (
            ["model=tiny_clip", "data=emoji", "pruner=topk", "budget.average_tokens=9"],
            "counts tokens in a language model",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(arguments, says, tmp_path, capsys):
    assert run(*arguments, output=tmp_path) == 2
    assert says in one_line(capsys.readouterr().err)


def test_a_model_without_a_classifier_lets_its_neighbours_vote(tmp_path):
    """DINOv2 as timm has it, small and with random weights: the gallery is the training split."""
    import timm
    from timm.models import save_for_hf

    sizes = {"img_size": 28, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)
    save_for_hf(model, tmp_path / "weights", model_args=sizes, safe_serialization=True)
    arguments = [
        "model=dinov2",
        f"model.source={tmp_path / 'weights'}",
        "data=emoji",
        "pruner=topk",
        "budget.ratio=1/2",
    ]
    assert run(*arguments, "data.gallery=[noto-v1]", "data.styles=[noto]", "data.size=12", output=tmp_path) == 0
    record = by_label(tmp_path / "run")["unpruned"]
    assert record["metrics"]["accuracy"]["n"] == 20 and record["model"]["neighbours"] == 20


def test_images_in_folders_are_sorted_by_the_names_of_the_folders(tmp_path):
    from ivtp.data.images import emoji

    data = emoji(324, ["noto"], 4, "photo")
    for place in range(40):
        sample = data[place]
        (tmp_path / "images" / sample["answer"]).mkdir(parents=True, exist_ok=True)
        sample["image"].save(tmp_path / "images" / sample["answer"] / f"{place}.png")
    arguments = ["model=tiny_clip", "data=imagefolder", f"data.path={tmp_path / 'images'}", "pruner=group_mean"]
    assert run(*arguments, "data.limit=40", output=tmp_path) == 0
    records = lines(tmp_path / "run" / "results.jsonl")
    assert records[0]["metrics"]["top5"]["mean"] > 0.5, "of 40 classes"
    assert json.loads(json.dumps(records[0]["data"]))["path"].endswith("images")
