"""Training-free visual token pruning: interchangeable pruners around frozen vision-language models.

model, processor = ivtp.load_model("tiny")
with ivtp.prune(model, "ivtp", keep=16):
    model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "ivtp.api",
    "prune": "ivtp.api",
    "shape_of": "ivtp.backbones",
    "patch_boxes": "ivtp.backbones.loading.image_inputs",
    "load_pruner": "ivtp.pruners",
    "list_pruners": "ivtp.pruners",
    "register_pruner": "ivtp.pruners",
    "Tokens": "ivtp.core.tokens",
    "Selection": "ivtp.core.tokens",
    "Attention": "ivtp.core.attention",
    "Pruner": "ivtp.pruners",
    "Stage": "ivtp.core.plan",
    "Plan": "ivtp.core.plan",
    "Schedule": "ivtp.core.schedule",
    "Cut": "ivtp.core.schedule",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Loaded on first use, so that `import ivtp` costs nothing beside torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ivtp' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
