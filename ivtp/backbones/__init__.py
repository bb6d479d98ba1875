"""Model families: how each one's frozen layers are opened between attention and FFN."""

from ivtp.backbones.family import Family, ModelError, register_family, shape_of

__all__ = ["Family", "ModelError", "register_family", "shape_of"]
