"""The oracle of pruning: the unmodified modules on the full sequence, with explicit masks over what was pruned.

Nothing here uses ivtp; kept positions come from a run's trace.
"""

from __future__ import annotations

import torch

from helpers.place import reference


def hidden_from(cuts, depth: int, patches: int, batch: int):
    """Per layer "b patches": True where a patch was cut before the layer's attention."""
    hidden = [torch.zeros(batch, patches, dtype=torch.bool) for _ in range(depth + 1)]
    for cut in cuts:
        gone = torch.ones(batch, patches, dtype=torch.bool)
        for sample in range(batch):
            gone[sample, cut.position[sample][cut.valid[sample]]] = False
        for layer in range(cut.layer + 1, depth + 1):
            hidden[layer] = hidden[layer] | gone
    return hidden


def mask4d(seen, causal: bool):
    """Additive mask "b 1 n n" from "b n" of keys that may be seen; a row that sees nothing sees itself."""
    n = seen.shape[1]
    allowed = seen[:, None, None, :].expand(-1, 1, n, n)
    if causal:
        allowed = allowed & torch.ones(n, n, dtype=torch.bool).tril()
    allowed = allowed | torch.eye(n, dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def with_prefix(hidden, prefix: int):
    return torch.cat([torch.zeros(hidden.shape[0], prefix, dtype=torch.bool), hidden], 1)


def clip_states(tower, pixels, cuts):
    """States after every layer of transformers' CLIP tower, on all tokens."""
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    layers = tower.encoder.layers
    hidden = hidden_from(cuts, len(layers), x.shape[1] - 1, x.shape[0])
    states = []
    for layer, gone in zip(layers, hidden[:-1], strict=True):
        x = layer(x, attention_mask=mask4d(~with_prefix(gone, 1), False))
        x = x[0] if isinstance(x, tuple) else x
        states.append(x)
    return states


def siglip_layers(tower, pixels, cuts):
    """States after every layer of transformers' SigLIP tower, on all tokens."""
    x = tower.embeddings(pixels)
    hidden = hidden_from(cuts, len(tower.encoder.layers), x.shape[1], x.shape[0])
    states = []
    for layer, gone in zip(tower.encoder.layers, hidden[:-1], strict=True):
        x = layer(x, attention_mask=mask4d(~gone, False))
        x = x[0] if isinstance(x, tuple) else x
        states.append(x)
    return states


def siglip_states(tower, pixels, cuts):
    """Its `last_hidden_state`."""
    return tower.post_layernorm(siglip_layers(tower, pixels, cuts)[-1])


def dinov2_states(tower, pixels, cuts):
    """States after every layer of transformers' DINOv2, on all tokens, from its layers' own parts.

    Attention is written out: in older versions of transformers its module takes no mask.
    """
    x = tower.embeddings(pixels)
    heads = tower.config.num_attention_heads
    layers = tower.encoder.layer
    hidden = hidden_from(cuts, len(layers), x.shape[1] - 1, x.shape[0])
    states = []
    for layer, gone in zip(layers, hidden[:-1], strict=True):
        q, k, v = (heads_of(linear(layer.norm1(x)), heads) for linear in dinov2_linears(layer)[:3])
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask4d(~with_prefix(gone, 1), False).to(q)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer.layer_scale1(dinov2_linears(layer)[3](mixed))
        x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
        states.append(x)
    return states


def dinov2_linears(layer):
    """Query, key, value and output projections, whatever transformers calls them."""
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    own = attention.attention
    return own.query, own.key, own.value, attention.output.dense


def open_clip_states(tower, pixels, cuts):
    """What leaves the blocks of an open_clip tower, on all tokens; torch takes one mask per head."""
    x = tower._embeds(pixels)
    blocks = tower.transformer.resblocks
    hidden = hidden_from(cuts, len(blocks), x.shape[1] - 1, x.shape[0])
    for block, gone in zip(blocks, hidden[:-1], strict=True):
        mask = mask4d(~with_prefix(gone, 1), False)[:, 0]
        x = block(x, attn_mask=mask.repeat_interleave(block.attn.num_heads, 0))
    return x


def timm_features(model, pixels, cuts):
    """`forward_features` of a timm ViT or Eva on all tokens."""
    x, rope = model._pos_embed(model.patch_embed(pixels)), None
    if isinstance(x, tuple):
        x, rope = x
    x = model.norm_pre(x)
    prefix = model.num_prefix_tokens
    hidden = hidden_from(cuts, len(model.blocks), x.shape[1] - prefix, x.shape[0])
    for number, (block, gone) in enumerate(zip(model.blocks, hidden[:-1], strict=True)):
        own = {} if rope is None else {"rope": rope[number] if model.rope_mixed else rope}
        x = block(x, attn_mask=mask4d(~with_prefix(gone, prefix), False), **own)
    return model.norm(x)


@reference
def llava_logits(model, input_ids, pixel_values, attention_mask, vision, language, position_ids=None, renumber=False):
    """Logits "b n vocabulary" over the whole sequence, and "b n" of what is left in the end.

    `input_ids` may go on beyond the prompt with generated tokens.
    """
    llava, config = model.model, model.config
    b, n = input_ids.shape
    tower_states = {"clip_vision_model": clip_states, "dinov2": dinov2_states}[config.vision_config.model_type]
    states = tower_states(llava.vision_tower, pixel_values, vision)
    feature = llava.multi_modal_projector(states[config.vision_feature_layer][:, 1:])
    image = input_ids == config.image_token_id
    image = image & (
        image.cumsum(1) <= feature.shape[1]
    )  # random weights may well generate <image>, which is just a word
    x = llava.get_input_embeddings()(input_ids).masked_scatter(image[:, :, None], feature)

    decoder = llava.language_model
    depth = decoder.config.num_hidden_layers
    patches = feature.shape[1]
    before = hidden_from(vision, len(states), patches, b)[-1]
    valid = attention_mask.bool()
    nothing = torch.zeros(b, n, dtype=torch.bool)
    seen_by = [
        valid & ~nothing.masked_scatter(image, gone | before) for gone in hidden_from(language, depth, patches, b)
    ]
    if position_ids is None:
        position_ids = (valid.long().cumsum(1) - 1).clamp_min(0)
    for layer in range(depth):
        position = (seen_by[layer].long().cumsum(1) - 1).clamp_min(0) if renumber else position_ids
        out = decoder.layers[layer](
            x, attention_mask=mask4d(seen_by[layer], True), position_embeddings=decoder.rotary_emb(x, position)
        )
        x = out[0] if isinstance(out, tuple) else out
    return model.lm_head(decoder.norm(x)), seen_by[depth]


# Eq. 2–4 of the paper, written out in float64


@reference
def dense_map(q, k, scale, bias=None, causal=False):
    """Eq. 2: A = softmax(q kᵀ · scale + bias), mean over heads; query heads share keys in order (GQA)."""
    q, k = q.double(), k.double()
    b, h, n, _ = q.shape
    m = k.shape[2]
    total = torch.zeros(b, n, m, dtype=torch.float64)
    for head in range(h):
        shared = k[:, head // (h // k.shape[1])]
        logits = q[:, head] @ shared.transpose(1, 2) * scale
        if bias is not None:
            logits = logits + bias.double()[:, None]
        if causal:
            logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(1), float("-inf"))
        total += logits.softmax(-1).nan_to_num(0.0)
    return total / h


@reference
def dense_rollout(maps, combine="residual"):
    """Eq. 3: the first layer of the group has no residual. For mean and max: over the maps (their reference row)."""
    if combine == "mean":
        return torch.stack(maps).mean(0)
    if combine == "max":
        return torch.stack(maps).amax(0)
    rolled = maps[0]
    eye = torch.eye(maps[0].shape[1], dtype=torch.float64)
    for current in maps[1:]:
        rolled = (current + eye if combine == "residual" else current) @ rolled
    return rolled


def dense_value_norm(v, heads):
    """‖V_i‖ with the value heads repeated for every query head and concatenated, float64."""
    v = v.double().repeat_interleave(heads // v.shape[1], 1)
    return v.transpose(1, 2).flatten(2).norm(dim=-1)


def dense_importance(row, value_norm, visual):
    """Eq. 4 over the tokens in `visual` "b v"."""
    score = (row * value_norm).gather(1, visual)
    return score / score.sum(1, keepdim=True)


def heads_of(x, heads):
    b, n, d = x.shape
    return x.view(b, n, heads, d // heads).transpose(1, 2)


def choose(scores, hidden, keep):
    """Kept patches, in raster order, and the new "b patches" of hidden ones."""
    order = scores.masked_fill(hidden, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :keep]
    gone = torch.ones_like(hidden).scatter(1, order, False)
    return order.sort(dim=1).values, gone


@reference
def ivtp_vision(tower, pixels, schedule):
    """GTP in transformers' CLIP tower on the whole sequence: pruned tokens are hidden, never removed.

    Returns kept positions per cut and the states after every layer.
    """
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    b, n, _ = x.shape
    hidden = torch.zeros(b, n - 1, dtype=torch.bool)
    cuts, maps, kept, states = {cut.layer: cut.keep for cut in schedule}, [], [], []
    for number, layer in enumerate(tower.encoder.layers):
        seen = ~with_prefix(hidden, 1)
        y, attn = layer.layer_norm1(x), layer.self_attn
        q, k, v = (heads_of(p(y), attn.num_heads) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        bias = torch.zeros(b, n).masked_fill(~seen, float("-inf"))
        maps.append(dense_map(q, k, attn.head_dim**-0.5, bias))
        out = layer(x, attention_mask=mask4d(seen, False))
        x = out[0] if isinstance(out, tuple) else out
        if number in cuts:
            row = dense_rollout(maps)[:, 0]
            visual = torch.arange(1, n).expand(b, -1)
            scores = (row * dense_value_norm(v, attn.num_heads)).gather(1, visual)
            positions, hidden = choose(scores, hidden, cuts[number])
            kept.append(positions)
            maps = []
        states.append(x)
    return kept, states, hidden


@reference
def ivtp_language(model, x, valid, image, hidden, schedule, pseudo, part1):
    """Stage 2 on the whole prompt with the pseudo CLS "b d" behind it for `part1` layers; kept positions per cut."""
    decoder = model.model.language_model
    b, n, _ = x.shape
    x = torch.cat([x, pseudo[:, None]], 1)
    position = torch.cat([(valid.long().cumsum(1) - 1).clamp_min(0), valid.long().sum(1, keepdim=True)], 1)
    places = image.nonzero()[:, 1].view(b, -1)
    cuts, maps, kept = {cut.layer: cut.keep for cut in schedule}, [], []
    for number, layer in enumerate(decoder.layers[:part1]):
        gone = torch.zeros_like(valid).masked_scatter(image, hidden)
        seen = torch.cat([valid & ~gone, torch.ones(b, 1, dtype=torch.bool)], 1)
        y, attn = layer.input_layernorm(x), layer.self_attn
        heads, groups = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
        cos, sin = (t[:, None] for t in decoder.rotary_emb(x, position))

        def rotate(t, cos=cos, sin=sin):
            half = t.shape[-1] // 2
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        q, k = rotate(heads_of(attn.q_proj(y), heads)), rotate(heads_of(attn.k_proj(y), groups))
        v = heads_of(attn.v_proj(y), groups)
        bias = torch.zeros(b, n + 1).masked_fill(~seen, float("-inf"))
        maps.append(dense_map(q, k, q.shape[-1] ** -0.5, bias, causal=True))
        out = layer(x, attention_mask=mask4d(seen, True), position_embeddings=decoder.rotary_emb(x, position))
        x = out[0] if isinstance(out, tuple) else out
        if number in cuts:
            row = dense_rollout(maps)[:, -1]
            scores = (row * dense_value_norm(v, heads)).gather(1, places)
            positions, hidden = choose(scores, hidden, cuts[number])
            kept.append(positions)
            maps = []
    return kept
