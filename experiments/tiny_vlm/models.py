"""The networks: transformers' own classes, and faster forward passes through their weights for training.

The fast passes compute the linear layers in bfloat16 (AMX units of recent CPUs, tensor cores of GPUs) and keep the
residual stream and the normalisations in float32. `check.py` compares them with the real classes.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

LOW = torch.bfloat16
WIDTH, HEADS, FEED, VISION_LAYERS, LANGUAGE_LAYERS, JOINT = 128, 4, 256, 13, 8, 64
PATCHES, PATCH, SIZE = 144, 8, 96
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=JOINT,
        hidden_act="gelu",
    )


def text_config(tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=JOINT,
        intermediate_size=2 * JOINT,
        projection_dim=JOINT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def llava_config(tokenizer) -> LlavaConfig:
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED,
        num_hidden_layers=LANGUAGE_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        projector_hidden_act="gelu",
    )


class Joint(nn.Module):
    """Vision tower, text encoder and the projections into their joint space: all that stage A trains, plus its heads.

    The dense heads and the learned scales are not shipped (but for the captions' scale, CLIP's `logit_scale`).
    """

    def __init__(self, clip_tokenizer, types: int, colors: int, middle: int = 6):
        super().__init__()
        self.middle = middle
        self.vision = CLIPVisionModel(vision_config())
        self.text = CLIPTextModelWithProjection(text_config(clip_tokenizer))
        self.visual_projection = nn.Linear(WIDTH, JOINT, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=WIDTH**-0.5)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, types + colors + 5)) for _ in range(2)
        )
        self.caption_scale = nn.Parameter(torch.tensor(2.3))  # logarithms
        self.word_scale = nn.Parameter(torch.tensor(2.3))
        self.caption_bias = nn.Parameter(torch.tensor(-3.0))


def tower(vision: nn.Module) -> nn.Module:
    """The module that holds `embeddings`, `pre_layrnorm`, `encoder`, `post_layernorm`."""
    return getattr(vision, "vision_model", vision)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (b, 96, 96, 3) to the flattened, normalised patches (b, 144, 192)."""
    b, grid = len(images), SIZE // PATCH
    x = (images.float() / 255 - images.new_tensor(MEAN, dtype=torch.float)) / images.new_tensor(STD, dtype=torch.float)
    x = x.view(b, grid, PATCH, grid, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(b, grid * grid, 3 * PATCH * PATCH)


def _linear(x: torch.Tensor, *layers: nn.Linear, scale: float = 1.0) -> torch.Tensor:
    """One bfloat16 product with the weights of several layers; the first is multiplied by `scale`."""
    weights = [layer.weight * scale if i == 0 and scale != 1 else layer.weight for i, layer in enumerate(layers)]
    biases = [
        layer.bias * scale if i == 0 and scale != 1 else layer.bias
        for i, layer in enumerate(layers)
        if layer.bias is not None
    ]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = (torch.cat(biases) if len(biases) > 1 else biases[0]).to(LOW) if biases else None
    return F.linear(x.to(LOW), weight.to(LOW), bias)


def _heads(x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    b, n, _ = x.shape
    return x.view(b, n, parts, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)


def _clip_layer(layer: nn.Module, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
    attention = layer.self_attn
    h = layer.layer_norm1(x)
    scale = (WIDTH // HEADS) ** -0.5
    if cls_only:
        x = x[:, :1]
        (q,) = _heads(_linear(h[:, :1], attention.q_proj, scale=scale), 1)
        k, v = _heads(_linear(h, attention.k_proj, attention.v_proj), 2)
    else:
        q, k, v = _heads(_linear(h, attention.q_proj, attention.k_proj, attention.v_proj, scale=scale), 3)
    mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    x = x + _linear(mixed.transpose(1, 2).reshape(x.shape), attention.out_proj)
    h = F.gelu(_linear(layer.layer_norm2(x), layer.mlp.fc1))
    return x + _linear(h, layer.mlp.fc2)


def fast_vision(
    vision: nn.Module, patches: torch.Tensor, kept: torch.Tensor | None = None, middle: int | None = None
) -> dict[str, torch.Tensor]:
    """Forward of `CLIPVisionModel` on all or on some of the patches.

    Args:
        vision: the real class.
        patches: (b, 144, 192), from `normalise`.
        kept: indices (b, n) of the patches that go in; position embeddings stay theirs.
        middle: also return the hidden state after so many layers.

    Returns:
        `penultimate` (b, 1 + n, width) = `hidden_states[-2]`, `cls` (b, width) = `post_layernorm` of the last layer's
        class token = `pooler_output`, and `middle`.
    """
    model = tower(vision)
    embeddings = model.embeddings
    position = embeddings.position_embedding.weight
    if kept is not None:
        patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
    x = F.linear(patches.to(LOW), embeddings.patch_embedding.weight.flatten(1).to(LOW)).float()
    x = x + (position[1:] if kept is None else position[1:][kept])
    cls = (embeddings.class_embedding + position[0]).expand(len(x), 1, -1)
    x = model.pre_layrnorm(torch.cat((cls, x), 1))
    out = {}
    for i, layer in enumerate(model.encoder.layers[:-1]):
        x = _clip_layer(layer, x)
        if i + 1 == middle:
            out["middle"] = x
    out["penultimate"] = x
    out["cls"] = model.post_layernorm(_clip_layer(model.encoder.layers[-1], x, cls_only=True)[:, 0])
    return out


def _rms(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (WIDTH,), norm.weight, norm.variance_epsilon)


def fast_llama(
    llama: nn.Module,
    prefix: torch.Tensor,
    prefix_positions: torch.Tensor,
    texts: torch.Tensor,
    valid: torch.Tensor,
    start: int = PATCHES + 1,
    read: int = 1,
) -> torch.Tensor:
    """Forward of `LlamaModel` on many texts that share a prefix: each sees the prefix and itself.

    Args:
        llama: the real class, without head.
        prefix: embeddings (b, p, width) of BOS and image tokens.
        prefix_positions: (b, p), ascending.
        texts: embeddings (b, q, t, width) of q texts each, padded on the left.
        valid: (b, q, t), False on padding.
        start: position of the first token of every text.
        read: how many last tokens of each text are wanted.

    Returns:
        Final, normalised states (b, q, read, width).
    """
    (b, p, _), (_, q, t, _) = prefix.shape, texts.shape
    x = torch.cat((prefix, texts.flatten(1, 2)), 1)
    at = (start - 1 + valid.long().cumsum(-1)).clamp(min=0).flatten(1)
    cos, sin = llama.rotary_emb(x, torch.cat((prefix_positions, at), 1))
    cos, sin = cos[:, None].to(LOW), sin[:, None].to(LOW)
    half = WIDTH // HEADS // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    lowest = torch.finfo(LOW).min / 4
    causal = torch.full((p, p), lowest, dtype=LOW, device=x.device).triu(1)
    seen = valid[:, None, :, None, :] & torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
    own_mask = torch.zeros(seen.shape, dtype=LOW, device=x.device).masked_fill(~seen, lowest)
    for layer in llama.layers[:-1]:
        x = llama_layer(layer, x, cos, sin, causal, own_mask, t)
    x = llama_layer(llama.layers[-1], x, cos, sin, causal, own_mask, read)
    return _rms(llama.norm, x).view(b, q, read, WIDTH)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(WIDTH // HEADS // 2, -1) * sin


def llama_layer(
    layer: nn.Module,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    causal: torch.Tensor,
    own_mask: torch.Tensor,
    read: int,
) -> torch.Tensor:
    """One layer of `fast_llama`. With `read` below the length of the texts only their last tokens go on."""
    attention, mlp = layer.self_attn, layer.mlp
    p, (b, _, q, _, t) = len(causal), own_mask.shape
    scale, head = (WIDTH // HEADS) ** -0.5, WIDTH // HEADS
    h = _rms(layer.input_layernorm, x)
    mixed = []
    if read < t:
        x, wanted = (z[:, p:].view(b, q, t, WIDTH)[:, :, t - read :].reshape(b, q * read, WIDTH) for z in (x, h))
        c, s = (z[:, :, p:].view(b, 1, q, t, head)[:, :, :, t - read :].flatten(2, 3) for z in (cos, sin))
        (ask,) = _heads(_linear(wanted, attention.q_proj, scale=scale), 1)
        ask = _rotate(ask, c, s)
        k, v = _heads(_linear(h, attention.k_proj, attention.v_proj), 2)
        k = _rotate(k, cos, sin)
    else:
        ask, k, v = _heads(_linear(h, attention.q_proj, attention.k_proj, attention.v_proj, scale=scale), 3)
        ask, k = _rotate(ask, cos, sin), _rotate(k, cos, sin)
        mixed.append((ask[:, :, :p] @ k[:, :, :p].transpose(-1, -2) + causal).softmax(-1) @ v[:, :, :p])
        ask = ask[:, :, p:]
    own = ask.reshape(b, HEADS, q, read, head) @ k[:, :, p:].reshape(b, HEADS, q, t, head).transpose(-1, -2)
    own = (own + own_mask[..., t - read :, :]).flatten(2, 3)
    weights = torch.cat((ask @ k[:, :, :p].transpose(-1, -2), own), -1).softmax(-1)
    local = weights[..., p:].reshape(b, HEADS, q, read, t) @ v[:, :, p:].reshape(b, HEADS, q, t, head)
    mixed.append(weights[..., :p] @ v[:, :, :p] + local.flatten(2, 3))
    x = x + _linear(torch.cat(mixed, 2).transpose(1, 2).reshape(x.shape), attention.o_proj)
    gate, up = _linear(_rms(layer.post_attention_layernorm, x), mlp.gate_proj, mlp.up_proj).chunk(2, -1)
    return x + _linear(F.silu(gate) * up, mlp.down_proj)


@torch.no_grad()
def start_like_identity(llama: nn.Module, share: float = 0.5) -> None:
    """Initial weights whose products W_q W_k and W_v W_o resemble the identity ("mimetic", arXiv 2305.09828).

    A token then attends to tokens like itself and copies them on, which is what answering about a picture needs.
    """
    head = WIDTH // HEADS

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = share * (torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        u, s, vh = torch.linalg.svd(matrix)
        root = s[:rank].sqrt()
        return (u[:, :rank] * root).T, root[:, None] * vh[:rank]

    for layer in llama.layers:
        attention = layer.self_attn
        for h in range(HEADS):
            part = slice(h * head, (h + 1) * head)
            attention.q_proj.weight[part], attention.k_proj.weight[part] = factors(head)
        value, out = factors(WIDTH)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(out.T)


def new_llava(tokenizer) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(llava_config(tokenizer))
