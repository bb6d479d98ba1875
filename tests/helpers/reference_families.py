"""The oracle of pruning for every vision-language family: the unmodified modules on all tokens, with explicit masks.

Nothing here uses ivtp; kept positions come from a run's trace.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers.place import reference
from helpers.reference import clip_states, hidden_from, mask4d, siglip_layers, with_prefix


def crops_of(model, batch) -> torch.Tensor:
    """All crops of a batch "c 3 h w" in the order of the prompts."""
    pixels = batch["pixel_values"]
    if pixels.ndim < 5:
        return pixels
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    counts = [1] * len(pixels)
    several = batch.get("batch_num_images")
    own = [n for n in several.tolist() for _ in range(n)] if several is not None else counts
    for i, size in enumerate(batch["image_sizes"]):
        if own[i] == 1:
            pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
            counts[i] = image_size_to_num_patches(size, pinpoints, side)
    return torch.cat([image[:count] for image, count in zip(pixels, counts, strict=True)])


def llava_features(model, batch, cuts):
    clip = model.config.vision_config.model_type == "clip_vision_model"
    states = (clip_states if clip else siglip_layers)(model.model.vision_tower, crops_of(model, batch), cuts)
    return model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, int(clip) :])


def llava_next_features(model, batch, cuts):
    """What the model's own packing makes of them, and which of it are newlines."""
    features = llava_features(model, batch, cuts)
    pack = model.model.pack_image_features
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    several = batch.get("batch_num_images")
    own = [n for n in several.tolist() for _ in range(n)] if several is not None else [1] * len(batch["image_sizes"])
    pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    counts = [
        image_size_to_num_patches(size, pinpoints, side) if n == 1 else 1
        for size, n in zip(batch["image_sizes"], own, strict=True)
    ]
    more = {"vision_feature_select_strategy": "default"} if model.config.model_type == "llava_next" else {}
    if not more:
        more = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    packed = pack(features.split(counts), batch["image_sizes"], image_newline=model.model.image_newline, **more)[0]
    blank = torch.zeros(*features.shape[:2], 1)
    newline = pack(blank.split(counts), batch["image_sizes"], image_newline=torch.ones(1), **more)[0]
    return packed, [found[:, 0] > 0.5 for found in newline]


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def qwen_features(model, batch, cuts):
    """Both towers with dense masks, image by image: windows, hidden units, and DeepStack's taps."""
    tower = model.model.visual
    config, unit = model.config.vision_config, tower.spatial_merge_unit
    grids = batch["image_grid_thw"].tolist()
    features, taps = [], []
    images = batch["pixel_values"].split([t * h * w for t, h, w in grids])
    for number, (patches, (t, h, w)) in enumerate(zip(images, grids, strict=True)):
        assert t == 1
        x = tower.patch_embed(patches)
        # Patches come unit by unit: row and column of each.
        unit_row, unit_column = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        row = (2 * unit_row.flatten()[:, None] + torch.tensor([0, 0, 1, 1])).flatten()
        column = (2 * unit_column.flatten()[:, None] + torch.tensor([0, 1, 0, 1])).flatten()
        if hasattr(tower, "pos_embed"):
            side = tower.num_grid_per_side
            table = tower.pos_embed.weight.view(side, side, -1)
            y = torch.linspace(0, side - 1, h)[row]
            z = torch.linspace(0, side - 1, w)[column]
            y0, z0 = y.floor().long(), z.floor().long()
            y1, z1 = (y0 + 1).clamp_max(side - 1), (z0 + 1).clamp_max(side - 1)
            fy, fz = (y - y0)[:, None], (z - z0)[:, None]
            x = x + (
                table[y0, z0] * (1 - fy) * (1 - fz)
                + table[y0, z1] * (1 - fy) * fz
                + table[y1, z0] * fy * (1 - fz)
                + table[y1, z1] * fy * fz
            )
        quarter = (config.hidden_size // config.num_heads) // 2
        inverse = 10000.0 ** -(torch.arange(0, quarter, 2).float() / quarter)
        angle = torch.cat([row[:, None] * inverse, column[:, None] * inverse] * 2, 1)
        cos, sin = angle.cos(), angle.sin()
        together = torch.ones(len(x), len(x), dtype=torch.bool)
        window = together
        if getattr(config, "window_size", None):
            side = config.window_size // config.patch_size
            of = row // side * 1000 + column // side
            window = of[:, None] == of
        own = [
            replace(cut, position=cut.position[number : number + 1], valid=cut.valid[number : number + 1])
            for cut in cuts
        ]
        hidden = [gone[0] for gone in hidden_from(own, config.depth, len(x) // unit, 1)]
        found = []
        for layer, block in enumerate(tower.blocks):
            whole = layer in getattr(tower, "fullatt_block_indexes", range(config.depth))
            seen = ~hidden[layer].repeat_interleave(unit)
            allowed = ((together if whole else window) & seen) | torch.eye(len(x), dtype=torch.bool)
            q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, config.num_heads, -1).permute(1, 2, 0, 3)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -1e30).softmax(-1)
            x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
            if layer in getattr(tower, "deepstack_visual_indexes", ()):
                found.append(tower.deepstack_merger_list[len(found)](x))
        features.append(tower.merger(x))
        taps.append(found)
    return features, [torch.cat(parts) for parts in zip(*taps, strict=True)]


def internvl_features(model, batch, cuts):
    tower, config = model.model.vision_tower, model.config
    x = tower.embeddings(batch["pixel_values"])
    rows, columns = tower.embeddings.patch_embeddings.patch_shape
    hidden = hidden_from(cuts, len(tower.encoder.layer), rows * columns // 4, len(x))
    states = [x]
    for layer, gone in zip(tower.encoder.layer, hidden[:-1], strict=True):
        grid = gone.view(-1, rows // 2, 1, columns // 2, 1).expand(-1, -1, 2, -1, 2).reshape(len(x), -1)
        mask = mask4d(~with_prefix(grid, 1), False)
        attention, _ = layer.attention(layer.layernorm_before(x), attention_mask=mask)
        x = x + layer.lambda_1 * attention
        x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
        states.append(x)
    last = tower.layernorm(x) if config.vision_feature_layer == -1 else states[config.vision_feature_layer]
    grid = last[:, 1:].view(len(x), rows, columns, -1)
    units = grid.view(len(x), rows // 2, 2, columns // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).flatten(3)
    return model.model.multi_modal_projector(units.flatten(1, 2))


@reference
def family_logits(model, batch, sequences, trace, mask=None):
    """Logits "b n vocabulary" of the whole, unshortened sequences (prompts and what was generated behind them), and
    "b n" of what is left in the end; `mask`: 0 on padding, where there is some behind the prompts too."""
    core, config, kind = model.model, model.config, model.config.model_type
    b, n = sequences.shape
    start = batch["input_ids"].shape[1]
    valid = torch.cat([batch["attention_mask"].bool(), torch.ones(b, n - start, dtype=torch.bool)], 1)
    valid = valid if mask is None else mask.bool()
    image = torch.zeros(b, n, dtype=torch.bool)
    image[:, :start] = batch["input_ids"] == config.image_token_id
    taps, newline = [], None
    if "pixel_values" not in batch:
        features = None
    elif kind.startswith("qwen"):
        features, taps = qwen_features(model, batch, trace.vision)
        features = torch.cat(features)
    elif kind == "internvl":
        features = internvl_features(model, batch, trace.vision).flatten(0, 1)
    elif kind == "llava":
        features = llava_features(model, batch, trace.vision).flatten(0, 1)
    else:
        features, newline = llava_next_features(model, batch, trace.vision)
        features, newline = torch.cat(features), torch.cat(newline)
    x = core.get_input_embeddings()(sequences)
    visual = image.clone()
    if features is not None:
        x = x.masked_scatter(image[:, :, None], features)
        if newline is not None:
            visual = image & ~torch.zeros_like(image).masked_scatter(image, newline)
    decoder = core.language_model
    depth = decoder.config.num_hidden_layers

    def gone(cuts):
        """Per layer "b n": tokens of the prompt that were cut before it; positions count a prompt's visual tokens."""
        hidden = [torch.zeros(b, n, dtype=torch.bool) for _ in range(depth + 1)]
        for cut in cuts:
            for row in range(b):
                places = visual[row].nonzero()[:, 0]
                out = torch.ones(len(places), dtype=torch.bool)
                out[cut.position[row][cut.valid[row]]] = False
                for layer in range(cut.layer + 1, depth + 1):
                    hidden[layer][row, places[out]] = True
        return hidden

    cuts = [*([trace.entered] if trace.entered is not None else []), *trace.language]
    seen = [valid & ~hidden for hidden in gone(cuts)]
    position = (valid.long().cumsum(1) - 1).clamp_min(0)
    if kind.startswith("qwen"):
        position = qwen_positions(sequences, image, valid, batch.get("image_grid_thw"))
    rotary = decoder.rotary_emb(x, position)
    for layer in range(depth):
        x = decoder.layers[layer](x, attention_mask=mask4d(seen[layer], True), position_embeddings=rotary)
        x = x[0] if isinstance(x, tuple) else x
        if layer < len(taps):
            x = x + torch.zeros_like(x).masked_scatter(image[:, :, None], taps[layer])
    return model.lm_head(decoder.norm(x)), seen[depth]


def qwen_positions(sequences, image, valid, grids):
    """M-RoPE written out: text counts on all three axes; an image's rows and columns start where the text stopped, and
    the text goes on behind the larger of both."""
    b, n = sequences.shape
    position = torch.zeros(3, b, n, dtype=torch.long)
    pictures = iter(grids.tolist() if grids is not None else [])
    for row in range(b):
        current, place = 0, 0
        while place < n:
            if not valid[row, place]:
                place += 1
            elif image[row, place]:
                _, h, w = next(pictures)
                h, w = h // 2, w // 2
                grid = torch.arange(h * w)
                position[0, row, place : place + h * w] = current
                position[1, row, place : place + h * w] = current + grid // w
                position[2, row, place : place + h * w] = current + grid % w
                current, place = current + max(h, w), place + h * w
            else:
                position[:, row, place] = current
                current, place = current + 1, place + 1
    return position
