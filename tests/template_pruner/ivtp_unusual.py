"""A pruner in one file: a score, and the stage and cut that use it."""

from ivtp import Cut, Plan, Stage


class Unusual:
    """Distance of a token's key from the mean key: higher stays."""

    needs = "last"  # it reads the last layer's attention record

    def __call__(self, attentions, tokens):
        keys = tokens.of_visual(attentions[-1].keys())
        return (keys - keys.mean(1, keepdim=True)).norm(dim=-1)


def unusual(shape, keep: int, layer: int = 6) -> Plan:
    """Unusual keys stay: one cut behind the attention of ViT layer `layer`."""
    return Plan(vision=Stage((Cut(layer, keep),), Unusual()))
