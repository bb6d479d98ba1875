"""Methods that choose in the vision tower."""

from __future__ import annotations

import torch

from helpers.golden_checks import Case, check
from helpers.golden_checks.tools import Watched, recorded, timm_vit, tokens_of
from ivtp.backbones.vision.timm import TimmVit
from ivtp.core.attention import Attention
from ivtp.core.loop import traverse
from ivtp.core.plan import Stage
from ivtp.core.reduces import Absorb, Combine, Drop, Fuse, Merge
from ivtp.core.schedule import Cut
from ivtp.core.scores import Layerwise
from ivtp.core.selects import Keys, TopK
from ivtp.pruners.ats import Sampled, cumulative, sample, unique
from ivtp.pruners.evit import Attentive, AttentiveAndRest
from ivtp.pruners.hiprune import AnchorsAndRegisters, Received
from ivtp.pruners.prumerge import Clusters, OneHead, WideKeys
from ivtp.pruners.visionzip import DominantAndContextual
from ivtp.pruners.vispruner import ImportantAndDiverse
from ivtp.pruners.vscan import NearestKept, TwoScans


def evit_stage(cuts: list[Cut], fused: bool, kept: list) -> Stage:
    """EViT as the package composes it; `kept` takes what every cut chose, without the slot of the rest."""

    def select(scores, metric, keep, tokens):
        selection = (AttentiveAndRest() if fused else Attentive())(scores, metric, keep, tokens)
        kept.append((scores, selection.index[:, : keep - fused], selection))
        return selection

    return Stage(cuts, Layerwise(raw=True), select, Fuse() if fused else Drop())


@check("evit", "block")
def evit_block(case: Case):
    from timm.models.vision_transformer import Block

    p, x = case.params, case["x"]
    norm = lambda width, **more: torch.nn.LayerNorm(width, eps=p["eps_layernorm"], **more)  # noqa: E731
    block = Block(p["dim"], p["heads"], p["mlp_ratio"], qkv_bias=True, norm_layer=norm).eval().requires_grad_(False)
    block.load_state_dict(case.state_dict())
    model = torch.nn.Module()
    model.num_prefix_tokens = 1
    model.blocks = [block]
    stays = int(case["left_tokens"])
    fused = p["fuse_token"]
    seen, kept = [], []
    stack = TimmVit(model)
    attended, attention = stack.attend(0, tokens_of(x), False)
    case.close("x_after_attn_residual", attended)
    torch.testing.assert_close(attention.map(), case["attn"].mean(1), atol=1e-4, rtol=1e-4)
    out, _ = traverse(stack, tokens_of(x), evit_stage([Cut(0, stays + fused)], fused, kept))
    scores, index, selection = kept[0]
    case.close("cls_attn", scores)
    case.equal("kept", index)
    rest = torch.ones_like(scores).scatter(1, index, 0.0)
    case.equal("dropped", rest.nonzero()[:, 1].view(len(x), -1))
    case.close("out", out.x)
    assert case["n_tokens_out"] == out.x.shape[1] - 1
    if fused:
        assert torch.equal(selection.into == stays, rest.bool())
        case.close("fused_token_after_mlp", out.x[:, -1:])
    assert not seen


@check("evit", "complement")
def evit_complement(case: Case):
    idx = case["idx"]
    scores = torch.zeros(len(idx), case.params["dim"]).scatter(
        1, idx, torch.arange(idx.shape[1], 0.0, -1).expand(idx.shape)
    )
    selection = AttentiveAndRest()(scores, None, idx.shape[1] + 1, tokens_of(scores[:, :, None], 0))
    assert torch.equal(selection.index[:, :-1], idx)
    case.equal("complement", (selection.into == idx.shape[1]).nonzero()[:, 1].view(len(idx), -1))


@check("evit", "model")
def evit_model(case: Case):
    p = case.params
    model = timm_vit(case)
    stack, kept = Watched(TimmVit(model)), []
    tokens = stack.embed(case["image"])
    cuts, left = [], tokens.visual_count
    for layer in range(p["depth"]):
        if f"block{layer}.kept" in case:
            left = case.tensors[f"block{layer}.kept"].shape[1] + p["fuse_token"]
            cuts.append(Cut(layer, left))
    out, _ = traverse(stack, tokens, evit_stage(cuts, p["fuse_token"], kept))
    for cut, (_, index, _) in zip(cuts, kept, strict=True):
        case.equal(f"block{cut.layer}.kept", index)
    for layer, after in enumerate(stack.after):
        case.close(f"block{layer}.tokens", after.x)
    case.close("logits", model.forward_head(model.norm(out.x)))


def cls_record(cls_attn):
    """A record whose CLS row looks at the patches as given "b h v"; the class token gets what is left."""
    own = 1 - cls_attn.sum(-1, keepdim=True)
    row = torch.cat([own.clamp_min(0), cls_attn], -1)
    n = row.shape[-1]
    return recorded(torch.cat([row[:, :, None], row.new_full((*row.shape[:2], n - 1, n), 1 / n)], 2))


@check("fastervlm")
def fastervlm(case: Case):
    tokens = tokens_of(torch.cat([torch.zeros_like(case["features"][:, :1]), case["features"]], 1))
    scores = Layerwise(raw=True)([cls_record(case["cls_attn"])], tokens)
    if (case["cls_attn"].sum(-1) <= 1 + 1e-5).all():
        case.close("mean_attn", scores)
    else:
        case.excuse("mean_attn", "more than a probability; only its order can be formed from a record")
    kept = TopK()(
        Layerwise()([cls_record(case["cls_attn"])], tokens), None, case.params["visual_token_num"], tokens
    ).index
    case.equal("kept", kept)
    case.equal("index_mask", torch.zeros_like(case["index_mask"]).scatter(1, kept, True))


@check("visionzip", "select")
def visionzip(case: Case):
    p, hidden = case.params, case["hidden_states"]
    contextual = p["contextual"]
    dominant = p["dominant_num_excl_cls"]
    tokens = tokens_of(hidden)
    scores = Layerwise()([recorded(case["attn"])], tokens)
    selection = DominantAndContextual(contextual)(scores, case["metric"][:, 1:], dominant + contextual, tokens)
    out = tokens.keep(selection, Absorb(), scores)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :dominant]
    cls = torch.zeros(len(hidden), 1, dtype=torch.long)
    case.equal("all_indices", torch.cat([cls, order + 1], 1))
    if "dominant_sorted" in case:
        case.equal("dominant_sorted", torch.cat([cls, selection.index[:, :dominant] + 1], 1))
        case.equal("contextual_targets", selection.index[:, dominant:] + 1)
        owners = torch.zeros_like(selection.into, dtype=torch.bool).scatter(1, selection.index, True)
        merged = (~owners).nonzero()[:, 1].view(len(hidden), -1)
        case.equal("merged_tokens", merged + 1)
        case.equal("assign", selection.into.gather(1, merged) - dominant)
    case.close("tokens_out", out.x)  # CLS first; the package leaves it in the tower


@check("visionzip", "clip")
def visionzip_clip(case: Case):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from ivtp.backbones.vision.transformers import ClipVit

    p = case.params
    weights = case.state_dict()
    ffn = next(value for key, value in weights.items() if key.endswith("mlp.fc1.bias")).shape[0]
    config = CLIPVisionConfig(
        hidden_size=p["hidden"], intermediate_size=ffn,
        num_hidden_layers=p["layers"], num_attention_heads=p["heads"], image_size=p["image_size"],
        patch_size=p["patch"], hidden_act=p["act"], layer_norm_eps=p["eps_layernorm"],
    )  # fmt: skip
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    own = model.state_dict()
    strip = "" if any(key.startswith("vision_model.") for key in own) else "vision_model."
    model.load_state_dict(
        {key.removeprefix(strip): value for key, value in weights.items() if "position_ids" not in key}
    )

    dominant, contextual = p["dominant_num_excl_cls"], p["contextual"]
    layer = p["layers"] - 2
    stack, seen = Watched(ClipVit(model)), []

    def metric(attentions, tokens):
        seen.append((attentions[-1], tokens))
        return Keys()(attentions, tokens)

    select = DominantAndContextual(contextual)
    stage = Stage((Cut(layer, dominant + contextual, "block"),), Layerwise(), select, Absorb(), metric)
    _, trace = traverse(stack, stack.embed(case["image"]), stage)
    attention, before = seen[0]
    case.close("metric", attention.keys())
    case.close("hidden_states", before.x)
    torch.testing.assert_close(attention.map(), case["attn"].mean(1), atol=1e-4, rtol=1e-4)
    case.close("tokens_out", stack.after[layer].x)
    order = Layerwise()([attention], before).argsort(dim=1, descending=True, stable=True)[:, :dominant]
    case.equal("all_indices", torch.cat([torch.zeros(len(order), 1, dtype=torch.long), order + 1], 1))
    assert torch.equal(trace[0].position[:, :dominant], order.sort(1).values)


@check("prumerge")
def prumerge(case: Case):
    p, k = case.params, case["k"]
    plus = p["variant"] == "plus"
    assert p["variant"] in ("prumerge", "plus"), f"unknown variant {p['variant']!r}"
    if plus and not p["adaptive"]:
        case.excuse("*", "training only: it counts tokens twice; the package's fixed budget never does")
        return
    # q and k of the whole width; two heads, so that the joining of heads is under test.
    q, k = (t.view(*t.shape[:2], 2, -1).transpose(1, 2) for t in (case["q"], k))
    tokens, seen = tokens_of(case["hidden_states"]), [Attention(q, k, k, 1.0)]
    scores = OneHead()(seen, tokens)
    case.close("cls_attn", scores)
    select = Clusters(p["adaptive"], plus)
    # Room for more than is there: adaptive counts have to come out of the scores.
    room = p["n_out"] if not p["adaptive"] else min(p["N"], p["n_out"] + 7)
    whole = p["B"] == 1 or not p["adaptive"]  # published: quartiles of the whole batch; here of each image
    rows = slice(None) if whole else slice(0, 0)
    selection = select(scores, WideKeys()(seen, tokens), room, tokens)
    out = tokens.keep(selection, Combine(), scores)
    if not whole:
        case.excuse("*", "the published ratio pools the batch; only its scores are compared")
        return
    n = p["n_out"]
    valid = torch.ones_like(selection.index) if selection.valid is None else selection.valid
    assert valid[:, :n].all(), "fewer tokens than published"
    assert not valid[:, n:].any(), "more tokens than published"
    kept = selection.index[:, : n - 1]
    case.equal("kept", kept, rows)
    case.equal("top_indices", kept[:, : p["topk"]])
    gone = torch.ones_like(scores).scatter(1, kept, 0.0)
    case.equal("complement", gone.nonzero()[:, 1].view(len(kept), -1))
    valid = torch.ones_like(scores, dtype=torch.bool)
    case.equal("cluster_members", select.nearest(WideKeys()(seen, tokens), kept, valid))
    case.close("tokens_out", out.x[:, 1 : n + 1])  # the class token stays in the tower


@check("vispruner")
def vispruner(case: Case):
    p = case.params
    features = torch.cat([torch.zeros_like(case["features"][:, :1]), case["features"]], 1)
    tokens = tokens_of(features)
    scores = Layerwise()([cls_record(case["cls_attn"])], tokens)
    kept = ImportantAndDiverse(p["important_ratio"])(scores, case["features"], p["visual_token_num"], tokens).index
    case.equal("kept", kept)
    case.equal("index_mask", torch.zeros_like(case["index_mask"]).scatter(1, kept, True))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : p["important_num"]]
    assert torch.equal(order.sort(1).values, case["important"].sort(1).values), "important"


@check("ats", "select")
def ats(case: Case):
    p, attn, v, x = case.params, case["attn"], case["v"], case["raw_x"]
    tokens = tokens_of(x)
    attention = recorded(attn, v)
    scores = Layerwise(True)([attention], tokens)
    order, curve, real = cumulative(scores)
    case.equal("sorted_indices", order)
    case.close("sorted_scores", scores.gather(1, order))
    case.close("normalized_cdf", curve)
    heights = p["n_ref_tokens"] - 1
    if p["n_tokens"] < p["N"]:
        case.excuse(
            "*", "the released code cuts the curve off here by the accident of a negative padding, see ivtp.pruners.ats"
        )
        return
    ys, picked = sample(curve, real, heights)
    case.close("ys", ys)
    case.equal("picked_rank", picked)
    rank, valid = unique(picked)
    n = p["N"] - 1
    rank = torch.where(valid, rank, n)[:, :n]
    width = rank.shape[1]
    assert (case["unique_rank"][:, width:] == n).all()
    case.equal("unique_rank", rank, (slice(None), slice(width)))

    selection = Sampled(heights)(scores, None, n, tokens)
    width = selection.index.shape[1]
    ids = torch.where(selection.valid, selection.index + 1, -1)
    case.equal("kept_ids", ids, (slice(None), slice(width)))
    assert (case["kept_ids"][:, width:] == -1).all()
    kept = tokens.keep(selection, Drop(), scores)
    size = kept.x.shape[1]
    policy = kept.valid[:, :, None]
    case.close("policy", policy.float(), (slice(None), slice(size)))
    assert not case["policy"][:, size:].any()
    case.close("selected_x", kept.x * policy, (slice(None), slice(size)))
    at = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), selection.index + 1], 1)
    rows = attn.gather(2, at[:, None, :, None].expand(-1, attn.shape[1], -1, attn.shape[3])) * policy[:, None]
    case.close("selected_attn", rows, (slice(None), slice(None), slice(size)))
    places = torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)[kept.valid]
    sampler = case["sampler"]
    samples = kept.valid.nonzero()[:, 0]
    assert torch.equal(sampler[:, 0], samples), "sampler"
    # The published sampler lists (sample, slot, 0), or (sample, token, 0): slots of the unique ranks.
    slots = kept.valid.nonzero()[:, 1]
    assert torch.equal(sampler[:, 1], slots) or torch.equal(sampler[:, 1], places), "sampler"


@check("ats", "chain")
def ats_chain(case: Case):
    """Blocks with sampling in some; each sample alone, and up to where padding enters the published scores."""
    from timm.models.vision_transformer import Block

    p, x = case.params, case["x"]
    model = torch.nn.Module()
    model.num_prefix_tokens = 1
    norm = lambda width, **more: torch.nn.LayerNorm(width, eps=p["eps_layernorm"], **more)  # noqa: E731
    model.blocks = [
        Block(p["dim"], p["heads"], p["mlp_ratio"], qkv_bias=True, norm_layer=norm) for _ in range(p["depth"])
    ]
    for i, block in enumerate(model.blocks):
        block.eval().requires_grad_(False).load_state_dict(case.state_dict(f"sd.{i}."))
    assert p["n_tokens"] >= p["N"], "the released code cuts the curve off by accident there"
    compared = 0
    for sample_number in range(len(x)):
        stack, chosen = Watched(TimmVit(model)), []

        def select(scores, metric, keep, tokens, chosen=chosen):
            selection = Sampled(p["n_ref_tokens"] - 1)(scores, metric, keep, tokens)
            chosen.append((scores, selection, tokens))
            return selection

        # The lowest score is never taken, so one less than all is room enough.
        cuts, left = [], p["N"] - 1
        for layer in p["ats_blocks"]:
            left -= 1
            cuts.append(Cut(layer, left))
        traverse(stack, tokens_of(x[sample_number : sample_number + 1]), Stage(cuts, Layerwise(True), select))
        cut = 0
        for layer in range(p["depth"]):
            if layer in p["ats_blocks"]:
                scores, selection, before = chosen[cut]
                cut += 1
                real = int(before.valid.sum())
                if layer != p["ats_blocks"][0] and real < case.tensors[f"block{layer}.attn_before_pruning"].shape[-1]:
                    break  # published: the padding of a shorter sample takes part in its curve
                # Slots of padding stand between the tokens here, not behind them.
                ids = selection.index[selection.valid]
                place = before.of_visual(before.valid).long().cumsum(1)[0]
                expected = case[f"block{layer}.kept_ids"][sample_number]
                assert torch.equal(place[ids], expected[expected >= 0]), f"block{layer}.kept_ids"
                order = cumulative(scores)[0][0]
                order = order[before.of_visual(before.valid)[0][order]]
                assert torch.equal(place[order] - 1, case[f"block{layer}.sorted_indices"][sample_number]), (
                    "sorted_indices"
                )
            after = stack.after[layer]
            n = int(after.valid.sum())
            torch.testing.assert_close(
                after.x[after.valid], case[f"block{layer}.tokens"][sample_number, :n], atol=1e-4, rtol=1e-4
            )
            if f"block{layer}.policy" in case:
                policy = case[f"block{layer}.policy"][sample_number, :, 0]
                assert policy.sum() == n
                assert policy[:n].all()
            compared += 1
    assert compared >= p["depth"], "no sample could be followed to the end"
    case.excuse(
        "block*.attn_before_pruning", "per head, with 1e-6 added to the softmax; the tokens it makes are compared"
    )


@check("hiprune")
def hiprune(case: Case):
    p = case.params
    shallow, deep = case["global_attn_shallow"], case["global_attn_deep"]
    select = AnchorsAndRegisters(p["alpha"], 24)
    if "attn_factor_x" in case:
        x = case["attn_factor_x"]
        tokens, seen = tokens_of(x), []
        for which in ("shallow", "deep"):
            q, k = (x @ case[f"attn_factor_{w}_{which}"] for w in ("wq", "wk"))
            q, k = (t.view(*t.shape[:2], p["H"], -1).transpose(1, 2) for t in (q, k))
            seen.append(Attention(q, k, k, p[f"temp_{which}"] / q.shape[-1] ** 0.5))
        case.close("global_attn_shallow", Received((0, 1), 0)(seen, tokens))
        case.close("global_attn_deep", Received((0, 1), 1)(seen, tokens))
    assert round(p["per_image"] * p["alpha"] / 5) == p["anchors"]
    tokens = tokens_of(deep[:, :, None], 0)
    case.equal("anchor_indices", select.anchors(shallow, p["per_image"]))
    selection = select(deep, shallow, p["per_image"], tokens)
    kept = torch.where(selection.valid, selection.index, -1)
    assert selection.valid.sum(1).tolist() == p["n_kept"]
    width = max(p["n_kept"])
    case.equal("kept", kept[:, :width])
    mask = torch.zeros_like(case["index_mask"], dtype=torch.long).scatter_add(
        1, selection.index, selection.valid.long()
    )
    case.equal("index_mask", mask > 0)


@check("hiprune", "qwen")
def hiprune_qwen(case: Case):
    """Sums instead of means, on any grid: strong anchors may be chosen twice, and fewer tokens stay."""
    p = case.params
    shallow, deep = case["token_attn_shallow"][None], case["token_attn_deep"][None]
    keep = round(p["N"] * p["retain"])
    assert keep == p["visual_token_num"]
    assert round(keep * p["alpha"] / 5) == p["anchors"]
    tokens = tokens_of(deep[:, :, None], 0)
    selection = AnchorsAndRegisters(p["alpha"], p["grid"][1])(deep, shallow, keep, tokens)
    kept = selection.index[selection.valid]
    case.equal("kept", kept[None])
    assert len(kept) == p["n_kept"]
    case.equal("select_mask", torch.zeros(p["N"], dtype=torch.long).index_fill(0, kept, 1))
    text = torch.cat([torch.arange(p["pre"]), torch.arange(p["post"]) + p["pre"] + p["N"]])
    case.equal("kept_sequence_positions", torch.cat([text, kept + p["pre"]]).sort().values)


@check("vscan", "encoder")
def vscan(case: Case):
    p, features = case.params, case["features"]
    tokens = tokens_of(torch.cat([torch.zeros_like(features[:, :1]), features], 1))
    seen = [cls_record(case["cls_attn_layer5"]), cls_record(case["cls_attn_layer_minus2"])]
    each = p["n_local_per_window"]
    assert each == int(p["visual_token_num"] * 0.5) // 16
    scan = TwoScans((5, -2), 24, 24, each)
    scores = scan(seen, tokens)
    # Published: what the windows cannot share evenly is lost.
    (keep,) = set(p["n_kept"])
    selection = NearestKept()(scores, features, keep, tokens)
    case.equal("kept", selection.index)
    case.equal("index_mask", torch.zeros_like(case["index_mask"]).scatter(1, selection.index, True))
    case.close("features_after_merging", tokens.keep(selection, Merge(), scores).x[:, 1:])
