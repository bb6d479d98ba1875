"""`python experiments/zoo/selection_time.py`: what each method's selection costs at 2,880 visual tokens, beside one ViT layer.

One LLaVA-NeXT-like image of 2,880 tokens, 320 of which stay; random scores, keys and features of CLIP ViT-L's and a 7B
model's sizes; one thread; the median of 5. Scores are not timed, selections and what they compare tokens by are.
"""

import time
from dataclasses import replace

import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ivtp.core.attention import Attention
from ivtp.core.flops import Layers, Shape
from ivtp.core.reduces import Merge
from ivtp.core.tokens import Tokens
from ivtp.pruners import list_pruners, load_pruner

TOKENS, KEEP, REPEATS = 2880, 320, 5
# A grid of 48 x 60 patches stands for the crops together.
SHAPE = Shape(
    Layers(24, 1024, 4096, 16, 16, 64, 2), TOKENS, 588, projector_in=1024, columns=60,
    language=Layers(32, 4096, 11008, 32, 32, 128, 3), vocabulary=32000, joint=768,
)  # fmt: skip


def median(work) -> float:
    """Seconds, after one call that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def tokens_of(width: int, text: int) -> Tokens:
    """A class token or some text around 2,880 visual tokens."""
    n = TOKENS + text
    place = torch.arange(n)[None]
    x = torch.randn(1, n, width)
    tokens = Tokens.of(x, place.clamp(1, TOKENS) == place, place == (0 if text == 1 else n - 1), position=place - 1)
    return replace(tokens, state=torch.randn_like(x), relevance=torch.randn(1, n))


def selection(site: str, pruner) -> float:
    stack, text = (SHAPE.vision, 1) if site == "vision" else (SHAPE.language, 64)
    tokens = tokens_of(stack.width, text)
    n = tokens.x.shape[1]
    seen = [Attention(*torch.randn(3, 1, stack.heads, n, stack.head_width).unbind(0), stack.head_width**-0.5)]
    scores = torch.rand(1, TOKENS)
    keep = TOKENS // 2 if pruner.reduce == Merge() else KEEP  # a step of ToMe can halve the tokens at most

    def work() -> None:
        metric = None if pruner.metric is None else pruner.metric(seen, tokens)
        pruner.select(scores, metric, keep, tokens)

    return median(work)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    layer: nn.Module = CLIPEncoderLayer(config).eval()
    x = torch.randn(1, TOKENS + 1, 1024)
    whole = median(lambda: layer(x, attention_mask=None))
    print(f"torch {torch.__version__}, one thread; one ViT-L layer over {TOKENS + 1} tokens: {whole:.3f} s\n")
    print("| pruner | site | selection, s | of one ViT layer |\n|---|---|--:|--:|")
    for name in list_pruners():
        if name == "none":
            continue
        plan = load_pruner(name, SHAPE, keep=KEEP)
        for site in ("vision", "language"):
            pruner = getattr(plan, site)
            if pruner is not None:
                seconds = selection(site, pruner)
                print(f"| `{name}` | {site} | {seconds:.4f} | {100 * seconds / whole:.1f} % |")


if __name__ == "__main__":
    main()
