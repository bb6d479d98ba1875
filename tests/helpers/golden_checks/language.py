"""Methods that choose in the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers.golden_checks import Case, check
from helpers.golden_checks.tools import Watched, llama, recorded, tokens_of
from ivtp.backbones.language.llama import Llama
from ivtp.core.attention import Attention
from ivtp.core.guidance import raters
from ivtp.core.loop import traverse
from ivtp.core.plan import Stage
from ivtp.core.schedule import Cut
from ivtp.core.scores import Layerwise, reference_row
from ivtp.core.selects import MaxMin, TopK, max_min_order
from ivtp.core.tokens import Selection
from ivtp.pruners.cdpruner import ConditionalDpp, Relevance, greedy_dpp_order, scaled
from ivtp.pruners.dart import KeyNorms, UnlikePivots, visit_order
from ivtp.pruners.sparsevlm import (
    ClusterMeans,
    Rated,
    RaterAttention,
    RaterRows,
    density_peaks,
    kept_of,
    rank_of,
    recycled,
)


def whole_prompt(kept, start: int, count: int, length: int):
    """Kept image tokens, counted from the image's start, as places in the whole sequence, text included."""
    b = len(kept)
    text = torch.cat([torch.arange(start), torch.arange(start + count, length)])
    return torch.cat([text.expand(b, -1), kept + start], 1).sort(1).values


@check("fastv", "select")
def fastv(case: Case):
    p = case.params
    attn = case["attn"]
    tokens = tokens_of(torch.zeros(p["B"], p["L"], 1), p["sys_len"], p["image_len"], reference=-1)
    kept = TopK()(Layerwise()([recorded(attn)], tokens), None, p["n_keep"], tokens).index
    # Published: the choice of the first sample goes for the whole batch; here every sample has its own.
    case.equal("kept_image", kept[0])
    whole = whole_prompt(kept, p["sys_len"], p["image_len"], p["L"])
    case.equal("keep_indexs", whole[0])
    visible = torch.zeros_like(case["key_visible_mask_variant"][:1]).scatter(1, whole[:1], True)
    case.equal("key_visible_mask_variant", visible[0], 0)


@check("fastv", "model")
def fastv_model(case: Case):
    p, x = case.params, case["inputs_embeds"]
    tokens = tokens_of(x, p["sys_len"], p["image_len"], reference=-1)
    tokens = type(tokens)(**{**tokens.__dict__, "position": tokens.position + p["sys_len"]})
    stack, seen = Watched(Llama(llama(case))), []

    def metric(attentions, tokens):
        seen.append(attentions[-1])

    keep = round(p["image_len"] * (1 - p["R"]))
    out, _ = traverse(stack, tokens, Stage((Cut(p["K"] - 1, keep, "block"),), Layerwise(), metric=metric))
    torch.testing.assert_close(seen[0].map(), case["attn_layer_before_K"].mean(1), atol=1e-4, rtol=1e-4)
    case.equal("keep_indexs", out.position[0])
    case.close("hidden_into_K", stack.after[p["K"] - 1].x)
    case.close("last_hidden_state", stack.norm(out.x))


@check("divprune")
def divprune(case: Case):
    p, features = case.params, case["features"][None]
    tokens = tokens_of(features, 0)
    unit = features / features.norm(dim=-1, keepdim=True)
    case.close("distance", (1 - unit @ unit.transpose(1, 2))[0])
    case.equal("selection_order", max_min_order(features, p["n_keep"])[0])
    case.equal("kept_sorted", MaxMin()(None, features, p["n_keep"], tokens).index[0])


@check("cdpruner")
def cdpruner(case: Case):
    p, features = case.params, case["features_projected"]
    images, texts = case["image_embeds"], case["text_embeds"]
    fit = torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T
    tokens = type(start := tokens_of(features, 0))(**{**start.__dict__, "relevance": fit.mean(-1)})
    scores = Relevance()([], tokens)
    # Published: least and most over the whole batch. One image alone is the same; more are scaled together here.
    quality = scaled(scores.flatten()[None]).view(scores.shape)
    case.equal("selection_order", greedy_dpp_order(quality, features, p["visual_token_num"]))
    if p["B"] == 1:
        kept = ConditionalDpp()(scores, features, p["visual_token_num"], tokens).index
    else:
        kept = greedy_dpp_order(quality, features, p["visual_token_num"]).sort(1).values
    case.equal("kept", kept)
    case.equal("index_mask", torch.zeros_like(case["index_mask"]).scatter(1, kept, True))


def stages(p: dict, count: int) -> list[Cut]:
    """Published: whole numbers of the first count, or (VScan) absolute ones."""
    ratios = p["ratios"]
    absolute = all(isinstance(ratio, int) for ratio in ratios)
    keeps = [min(ratio, count) if absolute else int(count * ratio) for ratio in ratios[1:]]
    return [Cut(layer - 1, keep, "block") for layer, keep in zip(p["layer_list"], keeps, strict=True)]


@check("pdrop", "model")
@check("vscan", "model")
def pdrop(case: Case):
    """Each sample of a batch alone: the published code pads on the right, the package on the left."""
    p, model = case.params, llama(case)
    for b in range(p["B"]):
        mask = case["input_mask"][b].bool()
        x = case["inputs_embeds"][b : b + 1, mask]
        count, start = p["image_tokens"][b], p["sys_len"]
        tokens = tokens_of(x, start, count, reference=-1)
        tokens = type(tokens)(**{**tokens.__dict__, "position": tokens.position + start})
        stack, seen = Watched(Llama(model, renumber=True)), []

        @dataclass(frozen=True)
        class Recorded(Layerwise):
            def __call__(self, attentions, tokens, seen=seen):
                seen.append(reference_row(attentions[-1], tokens))
                seen.append(tokens)
                return super().__call__(attentions, tokens)

        cuts = stages(p, count)
        out, trace = traverse(stack, tokens, Stage(cuts, Recorded(needs="next")))
        before = torch.arange(count)[None]
        for stage, (cut, kept) in enumerate(zip(cuts, trace, strict=True)):
            row, full = seen[2 * stage : 2 * stage + 2]
            n = full.x.shape[1]
            case.close(f"stage{stage}.batch{b}.scores", full.of_visual(row)[0])
            torch.testing.assert_close(full.x[0], case[f"stage{stage}.hidden_before"][b, :n], atol=1e-4, rtol=1e-4)
            at = torch.searchsorted(before[0], kept.position[0] - start)
            case.equal(f"stage{stage}.batch{b}.kept", at)
            before = kept.position - start
            after = stack.after[cut.layer]
            n = after.x.shape[1]
            torch.testing.assert_close(after.x[0], case[f"stage{stage}.hidden_after"][b, :n], atol=1e-4, rtol=1e-4)
            assert torch.equal(case[f"stage{stage}.position_ids_after"][b, :n], torch.arange(n)), "renumbered"
            if f"stage{stage}.attention_mask_after" in case:
                assert case[f"stage{stage}.attention_mask_after"][b].sum() == n
        torch.testing.assert_close(
            stack.norm(out.x)[0], case["last_hidden_state"][b, : out.x.shape[1]], atol=1e-4, rtol=1e-4
        )


def dart_tokens(p: dict, state):
    tokens = tokens_of(state, p["start"], p["image_len"], reference=-1)
    return type(tokens)(**{**tokens.__dict__, "position": tokens.position + p["start"], "state": state})


@check("dart", "select")
def dart(case: Case):
    p, keys = case.params, case["keys"]
    tokens = dart_tokens(p, case["last_layer_state_normed"])
    norms = KeyNorms()([Attention(keys, keys, keys, 1.0)], tokens)
    select = UnlikePivots(p["pivot_image"], p["pivot_text"])
    # Published: the choice of the first sample goes for the whole batch; here every sample has its own.
    image, text = select.pivots(norms, tokens)
    case.equal("pivot_image_ids", image[0])
    case.equal("pivot_text_ids", text[0])
    case.equal("pivot_visit_order", visit_order(torch.cat([image, text], 1), tokens.valid)[0])
    kept = select(None, norms, p["n_kept"], tokens).index + p["start"]
    case.equal("kept_sorted", kept[0])


@check("dart", "model")
def dart_model(case: Case):
    p = case.params
    x = case["inputs_embeds"]
    tokens = type(start := dart_tokens(p, x))(**{**start.__dict__, "state": None})
    stack, seen = Watched(Llama(llama(case))), []

    def metric(attentions, tokens):
        seen.append((attentions[-1], tokens, KeyNorms()(attentions, tokens)))
        return seen[0][2]

    keep = case["kept_sorted"].shape[0]
    select = UnlikePivots(p["pivot_image"], p["pivot_text"])
    out, trace = traverse(stack, tokens, Stage((Cut(p["K"] - 1, keep, "block"),), select=select, metric=metric))
    attention, before, norms = seen[0]
    case.close("keys", attention.k)
    case.close("last_layer_state_normed", before.state)
    image, text = select.pivots(norms, before)
    case.equal("pivot_image_ids", image[0])
    case.equal("pivot_text_ids", text[0])
    case.equal("pivot_visit_order", visit_order(torch.cat([image, text], 1), before.valid)[0])
    case.equal("kept_sorted", trace[0].position[0])
    case.equal("keep_indexs", out.position[0])
    case.close("last_hidden_state", stack.norm(out.x))


def rated_tokens(p: dict, x, image: int):
    """Tokens of a prompt with its raters, from the input embeddings."""
    tokens = tokens_of(x, p["sys_len"], image, reference=-1)
    return type(tokens)(**{**tokens.__dict__, "reference": raters(tokens), "facts": None})


@check("sparsevlm", "score")
def sparsevlm(case: Case):
    p, x = case.params, case["hidden_in"]
    tokens = rated_tokens(p, x, p["image_len"])
    behind = p["sys_len"] + p["image_len"]
    case.equal("rater_idx", tokens.reference[0, behind:].nonzero()[:, 0])
    image, text = x[:, p["sys_len"] : behind], x[:, behind:]
    case.close("rater_score", (image @ text.transpose(1, 2)).softmax(-1).mean(1))
    seen = [recorded(case["attn"])]
    relation = RaterAttention()(seen, tokens)
    case.close("relation", relation)
    rows = RaterRows()(seen, tokens)
    rank = rank_of(rows)
    case.equal("rank", rank)
    n = p["image_len"]
    there = torch.tensor([n])
    for name, kept in (
        ("topk", p["budget"]),
        ("rank", int(int(rank) * p["scale"] + p["bias"])),
        ("rank_video", int(rank)),
    ):
        kept = min(kept, n - 1) if name != "rank_video" or n > kept else n
        chosen = Rated(recycle=False).select(relation, torch.tensor([kept]), kept, tokens, there)
        mask = torch.zeros(1, n, dtype=torch.long).scatter_add(1, chosen.index, chosen.valid.long())
        case.equal(f"mask_{name}", mask > 0)
        assert kept == p[f"kept_{name}"]
    rated = Rated(recycle=False, rank=True, scale=p["scale"], bias=p["bias"])(relation, rows, n - 1, tokens)
    assert rated.valid.sum() == p["kept_rank"]
    assert case["s_flag_topk"].item() is True  # something is pruned at all, which is what a cut means here
    assert case["s_flag_rank"].item() == (n != int(rank))
    assert case["s_flag_rank_video"].item() == (n > int(rank))


@check("sparsevlm", "cluster")
def sparsevlm_cluster(case: Case):
    p, x = case.params, case["x"]
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    centres, cluster = density_peaks(x, torch.tensor([p["cluster_num"]] * len(x)), real, case["density_noise"])
    index = centres[:, : p["cluster_num"]]
    merged, _ = ClusterMeans()(x, torch.ones(x.shape[:2]), None, Selection(index, cluster))
    case.close("merged", merged)
    if p["noise_insensitive"]:
        again = density_peaks(x, torch.tensor([p["cluster_num"]] * len(x)), real)
        assert torch.equal(again[0][:, : p["cluster_num"]], index)
        assert torch.equal(again[1], cluster)


@check("sparsevlm", "plus_head_selection")
def sparsevlm_plus(case: Case):
    case.excuse("*", "SparseVLM+ (14 chosen heads and a positional bias map) is another method, which is not offered")


@check("sparsevlm", "forward")
def sparsevlm_forward(case: Case):
    p = case.params
    first = rated_tokens(p, case["inputs_embeds"], p["image_len"])
    count, rater = p["image_len"], first.reference
    for stage, layer in enumerate(p["pruning_loc"]):
        x, attn = case[f"prune{layer}.layer_out"], case[f"prune{layer}.attn"]
        tokens = tokens_of(x, p["sys_len"], count, reference=-1)
        rater = rater[:, -(x.shape[1] - count - p["sys_len"]) :]  # raters are among the words behind the image
        reference = torch.cat([torch.zeros(1, x.shape[1] - rater.shape[1], dtype=torch.bool), rater], 1)
        tokens = type(tokens)(**{**tokens.__dict__, "reference": reference, "facts": None})
        seen = [recorded(attn)]
        relation = RaterAttention()(seen, tokens)
        noise = case.get(f"prune{layer}.density_noise")
        if p["budgets"] is not None:
            kept = min(p["budgets"][stage], count - 1)
        else:
            scale, bias = p["scale_bias"]
            kept = min(int(int(rank_of(RaterRows()(seen, tokens))) * scale + bias), count - 1)
        total = kept + recycled(count - kept)[1]
        if noise is not None and noise.shape[1] != (width := recycled(count)[0]):
            noise = torch.cat([noise, torch.zeros(1, width - noise.shape[1])], 1)  # room that no sample fills
        rated = Rated(noise=noise)
        if p["budgets"] is not None and kept == p["budgets"][stage]:
            assert kept_of(total, count) >= kept
        there = torch.tensor([count])
        selection = rated.select(relation, torch.tensor([kept]), total, tokens, there)
        after = tokens.keep(selection, ClusterMeans(), relation)
        assert after.valid.all()
        case.close(f"prune{layer}.tokens_after", after.x)
        case.equal(f"prune{layer}.position_ids_after", torch.arange(after.x.shape[1])[None])  # position_ids=renumber
        source = after.position[0] + p["sys_len"]
        source[p["sys_len"] + kept : p["sys_len"] + total] = -1
        case.equal(f"prune{layer}.source_row", source)
        count = total
        assert p["lengths"][layer + 1] == after.x.shape[1]
    case.excuse("final", "the stub layers behind the last cut are not given")
