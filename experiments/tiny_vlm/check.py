"""The fast forward passes against transformers' own, in float32: `python experiments/tiny_vlm/check.py`."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.tiny_vlm import models, stage_a, stage_b
from ivtp.data.scenes import make_questions, make_scene


@torch.no_grad()
def vision() -> float:
    """Largest difference over the penultimate states, a middle layer's, and the class token's output."""
    joint, _ = stage_a.build()
    patches = models.normalise(torch.from_numpy(np.stack([make_scene("train", i).image for i in range(2)])))
    pixels = patches.view(2, 12, 12, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 96, 96)
    theirs = joint.vision(pixels, output_hidden_states=True)
    ours = models.fast_vision(joint.vision, patches, None, 6)
    pairs = (
        (theirs.hidden_states[-2], ours["penultimate"]),
        (theirs.hidden_states[6], ours["middle"]),
        (theirs.pooler_output, ours["cls"]),
    )
    return max((a - b).abs().max().item() for a, b in pairs)


@torch.no_grad()
def language() -> float:
    """Largest difference of the logits: many questions at once against one at a time, all patches or some."""
    llava, tokenizer = stage_b.new_model(0)
    decoder = llava.model.language_model
    groups = [make_questions(make_scene("train", i), i, 3) for i in range(2)]
    ids, valid, _ = stage_b.Questions(tokenizer).encode(groups, True)
    seen = torch.randn(2, models.PATCHES, models.WIDTH)
    worst = 0.0
    for kept in (None, torch.rand(2, models.PATCHES).argsort(1)[:, :40].sort(1).values):
        ours, _ = stage_b.forward(llava, seen, kept, ids, valid, 2)
        for i, group in enumerate(groups):
            at = torch.arange(models.PATCHES) if kept is None else kept[i]
            image = llava.model.multi_modal_projector(seen[i : i + 1, at])
            for j in range(len(group)):
                text = ids[i, j][valid[i, j]]
                words = decoder.embed_tokens(torch.cat((torch.tensor([tokenizer.bos_token_id]), text)))[None]
                inputs = torch.cat((words[:, :1], image, words[:, 1:]), 1)
                positions = torch.cat((torch.tensor([0]), at + 1, models.PATCHES + 1 + torch.arange(len(text))))[None]
                theirs = llava.lm_head(decoder(inputs_embeds=inputs, position_ids=positions).last_hidden_state[0, -2:])
                worst = max(worst, (theirs - ours[i, j]).abs().max().item())
    return worst


def main() -> None:
    models.LOW = torch.float32
    torch.manual_seed(0)
    worst = {"vision": vision(), "language": language()}
    print(worst)
    if max(worst.values()) > 1e-4:
        raise SystemExit("the fast forward passes differ from transformers'")


if __name__ == "__main__":
    main()
