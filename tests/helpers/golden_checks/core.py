"""ToMe and attention rollout."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.golden_checks import Case, check
from helpers.golden_checks.tools import Watched, recorded, timm_vit, tokens_of
from ivtp.backbones.vision.timm import TimmVit
from ivtp.core.loop import traverse
from ivtp.core.plan import Stage
from ivtp.core.reduces import Merge
from ivtp.core.schedule import Cut
from ivtp.core.scores import Rollout
from ivtp.core.selects import Bipartite, Keys
from ivtp.core.tokens import take
from ivtp.pruners.tome import merges_per_layer


@check("tome", "match", "match_ties")
def tome_match(case: Case):
    p, metric, x = case.params, case["metric"], case["x"]
    prefix = p["class_token"] + p["distill_token"]
    b, n, _ = metric.shape
    merges = min(p["r"], (n - prefix) // 2)
    assert merges == p["r_effective"]
    size = case.get("size")
    tokens = tokens_of(x, prefix, reference=0)
    if size is not None:
        tokens = type(tokens)(**{**tokens.__dict__, "size": size[:, :, 0]})
    selection = Bipartite()(None, metric[:, prefix:], n - prefix - merges, tokens)
    ours = tokens.keep(selection, Merge(), None)
    # Ids of the published order: with a distillation token it stands right behind the class token there, as here.
    case.close("merged_x", ours.x)
    case.close("merged_size", ours.size[:, :, None])
    ones = type(tokens)(**{**tokens.__dict__, "size": torch.ones(b, n)})
    if "merged_mean" in case:
        case.close("merged_mean", ones.keep(selection, Merge(), None).x)

    # Which output row each input token went to, over the whole sequence.
    into = torch.cat([torch.arange(prefix).expand(b, -1), selection.into + prefix], 1)
    source = torch.zeros(b, n - merges, n).scatter_(1, into[:, None], 1.0)
    case.close("source", source)
    if "unmerged_x" in case:
        if p["distill_token"]:
            case.excuse("unmerged_x", "the published unmerge forgets that the distillation token was moved")
        else:
            case.close("unmerged_x", take(ours.x, into))

    # The published indices count inside the two sets: tokens 0, 2, 4, … and tokens 1, 3, 5, …
    kept = torch.cat([torch.arange(prefix).expand(b, -1), selection.index + prefix], 1)
    gone = torch.ones(b, n).scatter(1, kept, 0.0).bool()
    target = take(kept, into)  # the token whose slot each token joins
    if "src_idx" in case:
        sources = case["src_idx"][:, :, 0] * 2
        assert torch.equal(gone.nonzero()[:, 1].view(b, -1), sources.sort(1).values), "src_idx"
        assert torch.equal(take(target, sources), case["dst_idx"][:, :, 0] * 2 + 1), "dst_idx"
        first = kept[kept % 2 == 0].view(b, -1)
        case.equal("unm_idx", (first // 2)[:, :, None])
    if "dst_of_src" in case:
        assert torch.equal(target[0, gone[0]] // 2, case["dst_of_src"]), "dst_of_src"


@check("tome", "parse_r")
def tome_schedule(case: Case):
    case.equal("schedule", torch.tensor(published_schedule(case.params, case.params["num_layers"])))


def published_schedule(p: dict, layers: int) -> list[int]:
    if p["r_type"] == "tuple":
        return merges_per_layer(p["r"][0], layers, p["r"][1])
    return merges_per_layer(p["r"], layers)


@check("tome", "prop_attention")
def tome_attention(case: Case):
    from timm.models.vision_transformer import Attention as TimmAttention

    p, x = case.params, case["x"]
    attn = TimmAttention(p["dim"], num_heads=p["heads"], qkv_bias=True).eval()
    names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    attn.load_state_dict({name.replace("_", "."): case[name] for name in names})
    same = torch.nn.Identity()
    block = SimpleNamespace(attn=attn, norm1=same, ls1=same, drop_path1=same, norm2=same, mlp=same, ls2=same)
    stack = TimmVit(SimpleNamespace(blocks=[block, block], num_prefix_tokens=1))
    tokens = tokens_of(x)
    if (size := case.get("size")) is not None:
        tokens = type(tokens)(**{**tokens.__dict__, "size": size[:, :, 0]})
    with torch.no_grad():
        out, attention = stack.attend(1, tokens, True)  # layer 0 has no sizes yet
        case.close("out", out - x)
        case.close("metric", attention.keys())
        assert case["attn"].shape[1] == p["heads"]
        torch.testing.assert_close(attention.map(), case["attn"].mean(1), atol=1e-4, rtol=1e-4)


@check("tome", "vit")
def tome_vit(case: Case):
    p = case.params
    assert published_schedule(p, p["depth"]) == p["r_schedule"]
    model = timm_vit(case, p["distilled"])
    stack = Watched(TimmVit(model))
    tokens = stack.embed(case["image"])
    prefix = model.num_prefix_tokens
    cuts, left = [], tokens.visual_count
    for layer, merges in enumerate(p["r_schedule"]):
        merges = min(merges, left // 2)
        left -= merges
        cuts += [Cut(layer, left)] if merges > 0 else []
    metrics, sources = [], []

    def metric(seen, tokens):
        metrics.append(seen[-1].keys())
        return Keys()(seen, tokens)

    def select(scores, metric, keep, tokens):
        selection = Bipartite()(scores, metric, keep, tokens)
        b, n = tokens.valid.shape
        into = torch.cat([torch.arange(prefix).expand(b, -1), selection.into + prefix], 1)
        sources.append(torch.zeros(b, keep + prefix, n).scatter_(1, into[:, None], 1.0))
        return selection

    stage = Stage(cuts, select=select, reduce=Merge(), metric=metric, proportional=p["prop_attn"])
    out, _ = traverse(stack, tokens, stage)
    merged_layers = [cut.layer for cut in cuts]
    for layer, after in enumerate(stack.after):
        case.close(f"block{layer}.tokens", after.x)
        case.close(f"block{layer}.size", after.size[:, :, None])
        if layer in merged_layers:
            case.close(f"block{layer}.metric", metrics[merged_layers.index(layer)])
        else:
            case.excuse(f"block{layer}.metric", "nothing is merged in this layer, so nothing reads the metric")
    source = torch.eye(tokens.x.shape[1]).expand(out.x.shape[0], -1, -1)
    for step in sources:
        source = step @ source
    case.close("source", source)
    case.close("logits", model.forward_head(model.norm(out.x)))


@check("rollout", "rollout")
def rollout(case: Case):
    """Abnar & Zuidema's joint attention: every row of it, through the records and scores that prune."""
    attn = case["attn"][:, None]  # one sample
    depth, _, _, n, _ = attn.shape
    seen = [recorded(layer) for layer in attn]
    sequence = torch.zeros(1, n, 1)
    last, plain, residual = depth - 1, [], []
    for layer in range(depth):
        rows_plain, rows_residual = [], []
        for row in range(n):
            tokens = tokens_of(sequence, 0, reference=row)
            rows_plain.append(Rollout("multiply", value_norm=False)(seen[: layer + 1], tokens)[0])
            # (A + I) / 2 in every layer, the first included; Eq. 3 of IVTP leaves I out there and does not halve.
            weight = torch.zeros(1, n).scatter_(1, torch.tensor([[row]]), 1.0)
            for attention in reversed(seen[1 : layer + 1]):
                weight = (attention.propagate(weight) + weight) / 2
            rows_residual.append((seen[0].propagate(weight) + weight)[0] / 2)
            ours = Rollout("residual", value_norm=False)(seen[: layer + 1], tokens)[0]
            torch.testing.assert_close((ours + weight[0]) / 2, case["joint_residual"][layer, row], atol=1e-4, rtol=1e-4)
        plain.append(torch.stack(rows_plain))
        residual.append(torch.stack(rows_residual))
    case.close("joint_noresidual", torch.stack(plain))
    case.close("joint_residual", torch.stack(residual))
    if "vitexplain.mean.0.0.result" in case:
        # Nothing discarded and heads averaged: the same product, whatever axis is normalised.
        case.close("vitexplain.mean.0.0.result", residual[last])
        mask = residual[last][0, 1:]
        case.close("vitexplain.mean.0.0.mask", (mask / mask.max()).view(case["vitexplain.mean.0.0.mask"].shape))
    case.excuse("flow_values", "attention flow (a max-flow per pair of tokens) is no pruning score")
    case.excuse("grad", "only the gradient variant reads it")
    case.excuse("vitexplain.grad.*", "needs gradients; this package runs frozen models without any")
    case.excuse(
        "vitexplain.m*", "fuses heads by max or min, or discards entries and then divides by the wrong axis' sums"
    )
