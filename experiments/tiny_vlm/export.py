"""The trained weights in transformers' formats: `ivtp/assets/tiny`, a LLaVA with the CLIP text half beside it."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.image_utils import PILImageResampling

from experiments.tiny_vlm import models, words

TARGET = Path(__file__).resolve().parents[2] / "ivtp" / "assets" / "tiny"
TEMPLATE = (
    "{% for message in messages %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image> {% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
PROMPT = "<image> {question}"


def processor(tokenizer) -> LlavaProcessor:
    """Resize to 96 pixels, crop, normalise as CLIP does; `<image>` becomes 144 places."""
    images = CLIPImageProcessor(
        size={"shortest_edge": models.SIZE},
        crop_size={"height": models.SIZE, "width": models.SIZE},
        image_mean=models.MEAN,
        image_std=models.STD,
        resample=PILImageResampling.BICUBIC,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=models.PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def assemble(joint: models.Joint, llava: LlavaForConditionalGeneration) -> None:
    """Put stage A's vision tower into the LLaVA."""
    models.tower(llava.model.vision_tower).load_state_dict(models.tower(joint.vision).state_dict())


def write(
    joint: models.Joint, llava: LlavaForConditionalGeneration, target: Path = TARGET, card: str | None = None
) -> None:
    """Write the folder beside the target, then swap; the old card stays where no new one is given."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer = words.language_tokenizer()
    llava.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=4,
        do_sample=False,
    )
    llava.float().save_pretrained(part)
    processor(tokenizer).save_pretrained(part)

    clip = part / "clip"
    clip_tokenizer = words.clip_tokenizer()
    config = CLIPConfig(
        text_config=models.text_config(clip_tokenizer).to_dict(),
        vision_config=models.vision_config().to_dict(),
        projection_dim=models.JOINT,
        architectures=["CLIPModel"],
    )
    config.save_pretrained(clip)
    clip_tokenizer.save_pretrained(clip)
    weights = {name: value for name, value in joint.text.state_dict().items() if "position_ids" not in name}
    weights["visual_projection.weight"] = joint.visual_projection.weight
    weights["logit_scale"] = joint.caption_scale
    weights = {name: value.detach().float().contiguous().clone() for name, value in weights.items()}
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    if card is not None:
        (part / "README.md").write_text(card)
    elif (target / "README.md").exists():
        shutil.copy(target / "README.md", part)
    size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    if size > 20e6:
        raise RuntimeError(f"the folder holds {size / 1e6:.1f} MB, at most 20 are allowed")
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(part, target)
    shutil.rmtree(old, ignore_errors=True)


def load_joint(path: Path) -> models.Joint:
    """Stage A's networks from a checkpoint."""
    from experiments.tiny_vlm import stage_a

    joint, _ = stage_a.build()
    joint.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return joint


def describe(target: Path = TARGET) -> str:
    """Files and sizes, for the log."""
    return json.dumps({str(f.relative_to(target)): f.stat().st_size for f in sorted(target.rglob("*")) if f.is_file()})
