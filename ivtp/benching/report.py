"""A bench record as tables."""

from __future__ import annotations

Table = tuple[str, list[str], list[list[str]]]

ASKED = (
    (
        "scoring_overhead",
        "scoring, selecting, reducing: IVTP over chance on its schedule",
        "≤ {}",
        {"cpu": 1.05, "gpu": 1.03},
    ),
    ("speedup_over_promise", "speed-up of the prefill over what FLOPs promise", "≥ {}", {"cpu": 0.9, "gpu": 0.9}),
    ("rollout_over_dense.time", "a group's rollout: times faster than dense maps", "≥ {}", {"cpu": 5, "gpu": 5}),
    ("rollout_over_dense.memory", "a group's rollout: times less memory", "≥ {}", {"cpu": 10, "gpu": 10}),
    ("loop_overhead", "our loop without a pruner over the model's own forward", "≤ {}", {"cpu": 1.03, "gpu": 1.03}),
    ("import_seconds", "import of ivtp beyond torch, seconds", "≤ {}", {"cpu": 1.0, "gpu": 1.0}),
    ("main_job_seconds", "the embedded main job, seconds", "≤ {}", {"cpu": 120}),
)
"""Key, what it is, and the bound per suite."""


def tables(record: dict) -> list[Table]:
    """What was asked, then for each case the prefill, its parts and where the rest went, then decoding and peers."""
    made = [_asked(record)]
    for case in record["cases"]:
        made += [_prefill(case), _parts(case), _operators(case)]
    return [*made, _decoding(record), _throughput(record["throughput"]), _peers(record), _rollout(record["rollout"])]


def _asked(record: dict) -> Table:
    rows = []
    for key, what, bound, bounds in ASKED:
        value = record
        for name in key.split("."):
            value = value.get(name) if value is not None else None
        if value is not None:
            limit = bounds.get(record["suite"])
            rows.append([what, f"{value:.3f}", bound.format(limit) if limit is not None else ""])
    m = record["machine"]
    title = f"{m['device']}, {m['cores']} cores, torch {m['torch']}, transformers {m['transformers']}, {m['dtype']}"
    return title, ["", "found", "asked"], rows


def _interval(value: dict, scale: float = 1.0) -> str:
    low, high = value["interval"]
    return f"{scale * value['median']:.4g} [{scale * low:.4g}, {scale * high:.4g}]"


def _model(found: dict) -> str:
    return found["model"] + (", weights packed" if found["packed"] else "")


def _case(found: dict) -> str:
    return f"{_model(found)}, batch {found['batch']}, {found['text']} text tokens"


def _prefill(case: dict) -> Table:
    title = f"{_case(case)}: prefill"
    rows = [[name, _interval(value, 1e3)] for name, value in case["seconds"].items()]
    rows += [
        ["speed-up", _interval(case["speedup"])],
        ["promised by FLOPs", f"{case['speedup_promised']:.4g}"],
        ["roofline", f"{case['speedup_of_roofline']:.4g}"],
    ]
    rows += [[f"GFLOP/s of an FFN projection, {n} rows", f"{v / 1e9:.0f}"] for n, v in case["product_flops"].items()]
    rows += [[f"peak MB, {name}", f"{value / 1e6:.1f}"] for name, value in case["peak_bytes"].items()]
    rows += [
        [f"KV cache MB, {name}", f"{v['found'] / 1e6:.2f} (closed form {v['closed'] / 1e6:.2f})"]
        for name, v in case["cache_bytes"].items()
    ]
    return title, ["ms; median [95 %]", ""], rows


def _parts(case: dict) -> Table:
    none, ivtp, lost = case["parts"]["none"], case["parts"]["ivtp"], case["rest"]
    flops, roof = case["flops"], case["roofline"]
    rows = []
    for part in ivtp:
        share = flops["ivtp"].get(part, 0) / flops["none"][part] if flops["none"].get(part) else None
        rows.append(
            [
                "select + reduce" if part == "pruner" else part.replace("_", " "),
                f"{1e3 * none[part]:.4g}",
                f"{1e3 * ivtp[part]:.4g}",
                "" if share is None else f"{100 * share:.1f} %",
                f"{1e3 * roof['ivtp'][part]:.4g}" if part in roof["ivtp"] else "",
                f"{100 * lost[part]:+.1f} %",
            ]
        )
    heads = ["", "unpruned ms", "pruned ms", "FLOPs left", "roofline ms", "beyond FLOPs, of the whole"]
    return f"{_case(case)}: where the time goes", heads, rows


def _operators(case: dict) -> Table:
    unpruned, ivtp = case["operators"]["unpruned"], case["operators"]["ivtp"]
    rows = [
        [name, *(f"{1e3 * found[name]:.4g}" if name in found else "" for found in (unpruned, ivtp))]
        for name in dict.fromkeys([*unpruned, *ivtp])
    ]
    return f"{_case(case)}: the longest operators, profiled once", ["", "unpruned ms", "pruned ms"], rows


def _decoding(record: dict) -> Table:
    rows = [
        [_model(found), name, _interval(value, 1e3), ""]
        for found in record["decoding"]
        for name, value in found["token"].items()
    ]
    rows += [[_model(f), "speed-up", _interval(f["speedup"]), f"{f['steps']} tokens"] for f in record["decoding"]]
    return "A generated token", ["", "", "ms; median [95 %]", ""], rows


def _throughput(found: dict) -> Table:
    rows = [
        [name, f"batch {size}", *(f"{value:.4g}" for value in orders.values())]
        for name, sizes in found["images_per_second"].items()
        for size, orders in sizes.items()
    ]
    title = f"{_model(found)}: images per second, {found['images']} prompts of up to {found['text']} text tokens"
    return title, ["", "", "of one length", "of several, as they come", "of several, sorted"], rows


def _peers(record: dict) -> Table:
    rows = [
        [
            _model(found),
            name,
            _interval(value, 1e3),
            _interval(found["over_sdpa"][name]),
            f"{found['peak_bytes'][name] / 1e6:.0f}",
            f"{found['cache_bytes'][name] / 1e6:.1f}",
        ]
        for found in record["peers"]
        for name, value in found["seconds"].items()
    ]
    return "Prefill as others do it", ["", "", "ms", "over SDPA", "peak MB", "KV cache MB"], rows


def _rollout(found: dict) -> Table:
    """Beside dense maps and the streamed score its bound: the products alone that no exact score can do without."""
    states = {"": found} | ({"heap emptied before": found["empty_heap"]} if found["empty_heap"] else {})
    rows = [
        [name, state, _interval(value, 1e3), f"{run['seconds']['dense']['median'] / value['median']:.3g}"]
        for state, run in states.items()
        for name, value in run["seconds"].items()
    ]
    title = f"A group's rollout: {found['n']} tokens, {found['heads']} heads, {found['layers']} layers"
    return title, ["", "", "ms; median [95 %]", "times faster than dense"], rows
