"""The trained weights in transformers' formats: a LLaVA in half precision with the CLIP text half beside it."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, GenerationConfig, LlavaProcessor
from transformers.image_utils import PILImageResampling

from experiments.scenes2 import models, stage_b

MOST = 20e6  # bytes of weights
TEMPLATE = (
    "{% for message in messages %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image> {% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def processor(tokenizer, patches: int) -> LlavaProcessor:
    """Resize, crop and normalise as CLIP does; `<image>` becomes as many places as there are patches."""
    side = models.SIDES[patches]
    images = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
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


def write(folder: Path, target: Path, patches: int) -> None:
    """Write the model of a run, made whole beside the target, then swapped in.

    Raises:
        RuntimeError: if the weights are larger than allowed.
    """
    joint = stage_b.load_joint(folder / "stage_a_done.pt", patches)
    llava, tokenizer = stage_b.new_model(patches, 0)
    llava.load_state_dict(torch.load(folder / "stage_b_done.pt", weights_only=True, map_location="cpu")["model"])
    models.tower(llava.model.vision_tower).load_state_dict(models.tower(joint.vision).state_dict())
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    llava.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=8,
        do_sample=False,
    )
    llava.half().save_pretrained(part)
    llava.config.dtype = torch.float32  # stored in half precision, run in single
    llava.config.save_pretrained(part)
    processor(tokenizer, patches).save_pretrained(part)
    _, clip_tokenizer = models.tokenizers()
    config = CLIPConfig(
        text_config=models.text_config(clip_tokenizer).to_dict() | {"dtype": "float32"},
        vision_config=models.vision_config(patches).to_dict(),
        projection_dim=models.JOINT,
        architectures=["CLIPModel"],
        dtype="float32",
    )
    config.save_pretrained(part / "clip")
    clip_tokenizer.save_pretrained(part / "clip")
    weights = {name: value for name, value in joint.text.state_dict().items() if "position_ids" not in name}
    weights["visual_projection.weight"] = joint.visual_projection.weight
    weights["logit_scale"] = joint.caption_scale
    weights = {name: value.detach().half().contiguous().clone() for name, value in weights.items()}
    save_file(weights, part / "clip" / "model.safetensors", metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in part.rglob("*.safetensors"))
    if size > MOST:
        raise RuntimeError(f"the weights hold {size / 1e6:.1f} MB, at most {MOST / 1e6:.0f} are allowed")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
