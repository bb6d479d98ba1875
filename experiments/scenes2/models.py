"""The networks: transformers' own classes, and faster forward passes through their weights for training.

The fast passes compute the linear layers and attention in bfloat16 (AMX units of recent CPUs, tensor cores of GPUs) and
keep the residual stream and the normalisations in float32. `check.py` compares them with the real classes.
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
    PreTrainedTokenizerFast,
)

from ivtp.data.scenes2.assets import FOLDER

LOW = torch.bfloat16
WIDTH, HEADS, HEAD = 192, 3, 64
VISION_LAYERS, VISION_FEED = 13, 480
LANGUAGE_LAYERS, LANGUAGE_FEED = 16, 192
TEXT_LAYERS, TEXT_WIDTH, JOINT = 3, 128, 128
PART_1 = 6  # layers of the language model that IVTP governs: 3 of 8, as in the paper
PATCH = 8
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
SIDES = {324: 144, 576: 192}


def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The language model's and the text encoder's."""
    return tuple(PreTrainedTokenizerFast.from_pretrained(FOLDER / name) for name in ("llama", "clip"))


def vision_config(patches: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=VISION_FEED,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDES[patches],
        patch_size=PATCH,
        projection_dim=JOINT,
        hidden_act="gelu",
    )


def text_config(tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=JOINT,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def llava_config(tokenizer, patches: int) -> LlavaConfig:
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=LANGUAGE_FEED,
        num_hidden_layers=LANGUAGE_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision_config(patches),
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=patches,
        projector_hidden_act="gelu",
    )


class Joint(nn.Module):
    """Vision tower, text encoder and the projections into their joint space: all that stage A trains, plus its heads.

    The dense head and the word scale are not shipped; the captions' scale is CLIP's `logit_scale`.
    """

    def __init__(self, clip_tokenizer, patches: int, labels: int):
        super().__init__()
        self.vision = CLIPVisionModel(vision_config(patches))
        self.text = CLIPTextModelWithProjection(text_config(clip_tokenizer))
        self.visual_projection = nn.Linear(WIDTH, JOINT, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=WIDTH**-0.5)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, labels))
        self.caption_scale = nn.Parameter(torch.tensor(2.3))  # logarithms
        self.word_scale = nn.Parameter(torch.tensor(2.7))
        self.caption_bias = nn.Parameter(torch.tensor(-4.0))


def tower(vision: nn.Module) -> nn.Module:
    """The module that holds `embeddings`, `pre_layrnorm`, `encoder`, `post_layernorm`."""
    return getattr(vision, "vision_model", vision)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (b, side, side, 3) to the flattened, normalised patches (b, n, 192)."""
    b, side = len(images), images.shape[1]
    grid = side // PATCH
    x = (images.float() / 255 - images.new_tensor(MEAN, dtype=torch.float)) / images.new_tensor(STD, dtype=torch.float)
    x = x.view(b, grid, PATCH, grid, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(b, grid * grid, 3 * PATCH * PATCH)


def linear(x: torch.Tensor, *layers: nn.Linear, scale: float = 1.0) -> torch.Tensor:
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
    return x.view(b, n, parts, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)


def clip_layer(layer: nn.Module, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
    """One layer of the tower; with `cls_only` only the class token goes on."""
    attention = layer.self_attn
    h = layer.layer_norm1(x)
    scale = HEAD**-0.5
    if cls_only:
        x = x[:, :1]
        (q,) = _heads(linear(h[:, :1], attention.q_proj, scale=scale), 1)
        k, v = _heads(linear(h, attention.k_proj, attention.v_proj), 2)
    else:
        q, k, v = _heads(linear(h, attention.q_proj, attention.k_proj, attention.v_proj, scale=scale), 3)
    mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    x = x + linear(mixed.transpose(1, 2).reshape(x.shape), attention.out_proj)
    h = F.gelu(linear(layer.layer_norm2(x), layer.mlp.fc1))
    return x + linear(h, layer.mlp.fc2)


def fast_vision(
    vision: nn.Module, patches: torch.Tensor, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward of `CLIPVisionModel`.

    Args:
        vision: the real class.
        patches: (b, n, 192), from `normalise`.
        kept: indices (b, k) of the patches that go in, for the `--drop` ablation; position embeddings stay theirs.

    Returns:
        `hidden_states[-2]` (b, 1 + n, width), and `pooler_output` (b, width): the class token after the last layer.
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
    for layer in model.encoder.layers[:-1]:
        x = clip_layer(layer, x)
    return x, model.post_layernorm(clip_layer(model.encoder.layers[-1], x, cls_only=True)[:, 0])


def rms(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (WIDTH,), norm.weight, norm.variance_epsilon)


def fast_llama(
    llama: nn.Module,
    prefix: torch.Tensor,
    positions: torch.Tensor,
    texts: torch.Tensor,
    valid: torch.Tensor,
    start: int,
    read: int,
    early: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Forward of `LlamaModel` on many texts that share a prefix: each sees the prefix and itself.

    Args:
        llama: the real class, without head.
        prefix: embeddings (b, p, width) of BOS and image tokens.
        positions: (b, p), ascending.
        texts: embeddings (b, q, t, width) of q texts each, padded on the left.
        valid: (b, q, t), False on padding.
        start: position of the first token of every text.
        read: how many last tokens of each text are wanted.
        early: also return the states after so many layers.

    Returns:
        Final, normalised states (b, q, read, width), and those after layer `early`, normalised by the final norm.
    """
    (b, p, _), (_, q, t, _) = prefix.shape, texts.shape
    x = torch.cat((prefix, texts.flatten(1, 2)), 1)
    at = (start - 1 + valid.long().cumsum(-1)).clamp(min=0).flatten(1)
    cos, sin = llama.rotary_emb(x, torch.cat((positions, at), 1))
    cos, sin = cos[:, None].to(LOW), sin[:, None].to(LOW)
    sin = torch.cat((-sin[..., : HEAD // 2], sin[..., HEAD // 2 :]), -1)
    lowest = torch.finfo(LOW).min / 4
    causal = torch.full((p, p), lowest, dtype=LOW, device=x.device).triu(1)
    seen = valid[:, None, :, None, :] & torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
    own_mask = torch.zeros(seen.shape, dtype=LOW, device=x.device).masked_fill(~seen, lowest)
    states = None
    for i, layer in enumerate(llama.layers[:-1], start=1):
        x = llama_layer(layer, x, cos, sin, causal, own_mask, t)
        if i == early:
            states = rms(llama.norm, x[:, p:].view(b, q, t, WIDTH)[:, :, t - read :])
    x = llama_layer(llama.layers[-1], x, cos, sin, causal, own_mask, read)
    return rms(llama.norm, x).view(b, q, read, WIDTH), states


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(HEAD // 2, -1) * sin


def llama_layer(layer, x, cos, sin, causal, own_mask, read: int) -> torch.Tensor:
    """One layer of `fast_llama`. With `read` below the length of the texts only their last tokens go on."""
    attention, mlp = layer.self_attn, layer.mlp
    p, (b, _, q, _, t) = len(causal), own_mask.shape
    scale = HEAD**-0.5
    h = rms(layer.input_layernorm, x)
    mixed = []
    if read < t:
        x, wanted = (z[:, p:].view(b, q, t, WIDTH)[:, :, t - read :].reshape(b, q * read, WIDTH) for z in (x, h))
        c, s = (z[:, :, p:].view(b, 1, q, t, HEAD)[:, :, :, t - read :].flatten(2, 3) for z in (cos, sin))
        (ask,) = _heads(linear(wanted, attention.q_proj, scale=scale), 1)
        ask = _rotate(ask, c, s)
        k, v = _heads(linear(h, attention.k_proj, attention.v_proj), 2)
        k = _rotate(k, cos, sin)
    else:
        ask, k, v = _heads(linear(h, attention.q_proj, attention.k_proj, attention.v_proj, scale=scale), 3)
        ask, k = _rotate(ask, cos, sin), _rotate(k, cos, sin)
        mixed.append((ask[:, :, :p] @ k[:, :, :p].transpose(-1, -2) + causal).softmax(-1) @ v[:, :, :p])
        ask = ask[:, :, p:]
    own = ask.reshape(b, HEADS, q, read, HEAD) @ k[:, :, p:].reshape(b, HEADS, q, t, HEAD).transpose(-1, -2)
    own = (own + own_mask[..., t - read :, :]).flatten(2, 3)
    weights = torch.cat((ask @ k[:, :, :p].transpose(-1, -2), own), -1).softmax(-1)
    local = weights[..., p:].reshape(b, HEADS, q, read, t) @ v[:, :, p:].reshape(b, HEADS, q, t, HEAD)
    mixed.append(weights[..., :p] @ v[:, :, :p] + local.flatten(2, 3))
    x = x + linear(torch.cat(mixed, 2).transpose(1, 2).reshape(x.shape), attention.o_proj)
    gate, up = linear(rms(layer.post_attention_layernorm, x), mlp.gate_proj, mlp.up_proj).chunk(2, -1)
    return x + linear(F.silu(gate) * up, mlp.down_proj)


@torch.no_grad()
def start_like_identity(llama: nn.Module) -> None:
    """Initial weights whose products W_q W_k and W_v W_o resemble the identity ("mimetic", arXiv 2305.09828).

    A token then attends to tokens like itself and copies them on, which is what answering about an image needs.
    """

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = 0.5 * (torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        u, s, vh = torch.linalg.svd(matrix)
        root = s[:rank].sqrt()
        return (u[:, :rank] * root).T, root[:, None] * vh[:rank]

    for layer in llama.layers:
        attention = layer.self_attn
        for h in range(HEADS):
            part = slice(h * HEAD, (h + 1) * HEAD)
            attention.q_proj.weight[part], attention.k_proj.weight[part] = factors(HEAD)
        value, out = factors(WIDTH)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(out.T)


def new_llava(tokenizer, patches: int) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(llava_config(tokenizer, patches))
