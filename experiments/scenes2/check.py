"""The fast forward passes against transformers' own, in float32: `python -m experiments.scenes2.check`."""

import numpy as np
import torch

from experiments.scenes2 import models, stage_a, stage_b
from ivtp.data.scenes2 import make_scene


@torch.no_grad()
def vision(patches: int) -> float:
    """Largest difference over the penultimate states and the class token's output."""
    joint, _ = stage_a.build(patches)
    side = models.SIDES[patches]
    images = torch.from_numpy(np.stack([make_scene("train", i, size=side)[0].image for i in range(2)]))
    ours = models.fast_vision(joint.vision, models.normalise(images))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (models.MEAN, models.STD))
    theirs = joint.vision((images.permute(0, 3, 1, 2) / 255 - mean) / std, output_hidden_states=True)
    pairs = ((theirs.hidden_states[-2], ours[0]), (theirs.pooler_output, ours[1]))
    return max((a - b).abs().max().item() for a, b in pairs)


@torch.no_grad()
def language(patches: int) -> float:
    """Largest difference of the logits: many questions at once against one at a time, all tokens, some, or none."""
    llava, tokenizer = stage_b.new_model(patches, 0)
    encoder, decoder = stage_b.Encoder(tokenizer), llava.model.language_model
    side = models.SIDES[patches]
    made = [make_scene("train", i, size=side)[1] for i in range(2)]
    groups = [[(q.family, q.text, q.answer) for q in questions] for questions in made]
    ids, valid, targets = encoder(groups)
    read = targets.shape[-1]
    seen = torch.randn(2, patches, models.WIDTH)
    worst = 0.0
    for kept in (None, torch.rand(2, patches).argsort(1)[:, :40].sort(1).values, "blind"):
        blind = isinstance(kept, str)
        ours, *_ = stage_b.forward(llava, None if blind else seen, None if blind else kept, ids, valid, read)
        for i, group in enumerate(groups):
            at = torch.arange(patches) if kept is None else torch.zeros(0, dtype=torch.long) if blind else kept[i]
            image = llava.model.multi_modal_projector(seen[i : i + 1, at])
            for j in range(len(group)):
                text = ids[i, j][valid[i, j]]
                words = decoder.embed_tokens(torch.cat((torch.tensor([tokenizer.bos_token_id]), text)))[None]
                inputs = torch.cat((words[:, :1], image, words[:, 1:]), 1)
                start = 1 if blind else patches + 1
                positions = torch.cat((torch.tensor([0]), at + 1, start + torch.arange(len(text))))[None]
                states = decoder(inputs_embeds=inputs, position_ids=positions).last_hidden_state
                used = targets[i, j] >= 0
                theirs = llava.lm_head(states[0, -read:][used[-len(states[0]) :]])
                worst = max(worst, (theirs - ours[i, j][used]).abs().max().item())
    return worst


def main() -> None:
    models.LOW = torch.float32
    torch.manual_seed(0)
    worst = {f"{part.__name__} {patches}": part(patches) for patches in models.SIDES for part in (vision, language)}
    print(worst)
    if max(worst.values()) > 1e-4:
        raise SystemExit("the fast forward passes differ from transformers'")


if __name__ == "__main__":
    main()
