"""Tables of closed-form FLOPs."""

from ivtp.report import paper
from ivtp.report.tables import Column, Table, digits, make_table, ratio

PARTS = ("vision", "projector", "language", "extra", "total")


def tables(costs: list[dict], convention: str = "paper") -> list[Table]:
    """Table per model: the parts of each row; for several text lengths, the totals side by side.

    convention  that of the costs, "run" or "paper"; or one of others to be added, "all": each
    """
    models = dict.fromkeys(cost["model"] for cost in costs)
    return [_of_model([cost for cost in costs if cost["model"] == model], convention) for model in models]


def _of_model(costs: list[dict], convention: str) -> Table:
    first = costs[0]
    texts = list(dict.fromkeys(cost["text"] for cost in costs))
    unit, scale = ("TFLOPs", 1) if max(cost["tflops"]["total"] for cost in costs) > 0.1 else ("GFLOPs", 1e3)

    def column(heading: str, value) -> Column:
        return Column(heading, lambda cost: scale * value(cost), digits)

    label = Column("row", lambda cost: cost["label"])
    if len(texts) > 1:
        totals = {(cost["label"], cost["text"]): _total(cost, convention) for cost in costs}
        several = [column(str(text), lambda cost, text=text: totals[cost["label"], text]) for text in texts]
        rows = {cost["label"]: cost for cost in costs}.values()
        return make_table(f"{first['model']}, {unit} of one prefill by text tokens", [label, *several], rows)

    others = {"run": [], "paper": [], "all": list(first["conventions"])}.get(convention, [convention])
    columns = [
        label,
        Column("budget", lambda cost: cost["budget"]),
        Column("visual tokens", lambda cost: " ".join(map(str, cost["tokens"]))),
        Column("average tokens", lambda cost: cost["average_tokens"], digits),
        *(column(part, lambda cost, part=part: cost["tflops"][part]) for part in PARTS),
        Column("of unpruned", lambda cost: cost["tflops"]["total"] / first["tflops"]["total"], ratio),
        *([Column("the paper's total", _printed)] if convention == "paper" and any(map(_printed, costs)) else []),
        *(column(name, lambda cost, name=name: cost["conventions"][name]) for name in others),
    ]
    prompt = (
        f"{unit} of one image" if first["average_tokens"] is None else f"{texts[0]} text tokens, {unit} of one prefill"
    )
    return make_table(f"{first['model']}, {prompt}", columns, costs)


def _total(cost: dict, convention: str) -> float:
    return cost["tflops"]["total"] if convention in ("run", "paper", "all") else cost["conventions"][convention]


def _printed(cost: dict) -> str:
    """Total that the paper prints for this row, if it is about this model and this much text."""
    identity = cost["paper"]
    if identity is None or cost["text"] != 512 or paper.table(identity.partition("/")[0])["model"] != cost["model"]:
        return ""
    return f"{paper.row(identity)['tflops']:g}"
