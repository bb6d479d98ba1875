"""A method in one file: a score, and how it is laid out over a model."""

from ivtp import Cut, Plan, Pruner


class Unusual:
    """Distance of a token's key from the mean key: higher stays."""

    needs = "last"  # it reads the last layer's attention record

    def __call__(self, seen, tokens):
        keys = tokens.of_visual(seen[-1].keys())
        return (keys - keys.mean(1, keepdim=True)).norm(dim=-1)


def unusual(shape, keep: int, layer: int = 6) -> Plan:
    """Unusual keys stay: one cut behind the attention of ViT layer `layer`."""
    return Plan(vision=Pruner((Cut(layer, keep),), Unusual()))
