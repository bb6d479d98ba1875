"""Tables of a timing record."""

from ivtp.report.tables import Table

BOUNDS = (
    (
        "scoring_overhead",
        "scoring, selecting, reducing: IVTP over random scores on its schedule",
        "≤ {}",
        {"cpu": 1.05, "gpu": 1.03},
    ),
    ("speedup_over_promise", "speed-up of the prefill over what FLOPs promise", "≥ {}", {"cpu": 0.9, "gpu": 0.9}),
    ("rollout_over_dense.time", "a group's rollout: times faster than dense maps", "≥ {}", {"cpu": 5, "gpu": 5}),
    ("rollout_over_dense.memory", "a group's rollout: times less memory", "≥ {}", {"cpu": 10, "gpu": 10}),
    ("loop_overhead", "our loop without a pruner over the model's own forward", "≤ {}", {"cpu": 1.03, "gpu": 1.03}),
    (
        "end_to_end_over_model",
        "from JPEG files to answers: images per second over the model alone",
        "≥ {}",
        {"gpu": 0.9},
    ),
    ("import_seconds", "import of ivtp beyond torch, seconds", "≤ {}", {"cpu": 1.0, "gpu": 1.0}),
    (
        "pipeline.clip.over_model.2.median",
        "the loop of a run over its model alone: CLIP processor, 2 workers, 20 ms an image",
        "≥ {}",
        {"pipeline": 0.9},
    ),
    ("main_job_seconds", "the embedded main job, seconds", "≤ {}", {"cpu": 120}),
)
"""Key in the record, description, form of the bound, and the bound per suite."""


def tables(record: dict) -> list[Table]:
    """Tables of the bounds, then of each case's prefill, parts and operators, then of decoding, throughput and peers; of the
    pipeline, its own."""
    parts = [_bounds(record)]
    if "pipeline" in record:
        return [*parts, _pipeline(record["pipeline"])]
    if "lead" in record:
        return _lead(record)
    for case in record["cases"]:
        parts += [_prefill(case), _parts(case), _operators(case)]
    parts += [_methods(compared) for compared in record["methods"]]
    parts += [_end_to_end(loop) for loop in record["end_to_end"]]
    parts += [_decoding(record), _throughput(record["throughput"]), _peers(record), _rollout(record["rollout"])]
    return parts + ([_sums(record["sums"])] if record["sums"] else [])


def _bounds(record: dict) -> Table:
    rows = []
    for key, description, bound, bounds in BOUNDS:
        value = record
        for name in key.split("."):
            value = value.get(name) if value is not None else None
        if value is not None:
            limit = bounds.get(record["suite"])
            rows.append([description, f"{value:.3f}", bound.format(limit) if limit is not None else ""])
    m = record["machine"]
    title = f"{m['device']}, {m['cores']} cores, torch {m['torch']}, transformers {m['transformers']}, {m['dtype']}"
    return Table(title, ["", "measured", "bound"], rows)


def _lead(record: dict) -> list[Table]:
    lead, m = record["lead"], record["machine"]
    compared = "against" in lead["commits"]
    rows = []
    for case in lead["cases"]:
        row = [
            case["model"],
            case["pruner"],
            case["keep"] or "",
            case["batch"],
            _interval(case["seconds"]["this"], 1e3),
        ]
        row += [f"{case['images_per_second']:.3g}", _interval(case["over_own"])]
        row += [_interval(case["over_against"]) if "over_against" in case else ""] if compared else []
        rows.append([*map(str, row), f"{case['peak_bytes']['this'] / 1e6:.1f}", f"{case['peak_of_own']:.3f}"])
    heads = ["model", "pruner", "tokens", "batch", "ms; median [95 %]", "images/s", "over own forward"]
    heads += [f"over {lead['commits']['against']}"] if compared else []
    title = f"{lead['model']}, {lead['text']} text tokens; {m['device']}, {m['cores']} cores, {m['blas']}, torch {m['torch']}"
    note = "; ".join(f"{name}: {reason}" for name, reason in lead["left_out"].items())
    return [Table(title, [*heads, "peak MB", "of own"], rows, note)]


def _interval(value: dict, scale: float = 1.0) -> str:
    low, high = value["interval"]
    return f"{scale * value['median']:.4g} [{scale * low:.4g}, {scale * high:.4g}]"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def _model(part: dict) -> str:
    return part["model"] + (", weights packed" if part["packed"] else "")


def _case(part: dict) -> str:
    return f"{_model(part)}, batch {part['batch']}, {part['text']} text tokens"


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
    return Table(title, ["ms; median [95 %]", ""], rows)


def _parts(case: dict) -> Table:
    none, ivtp, lost = case["parts"]["none"], case["parts"]["ivtp"], case["rest"]
    flops, roof = case["flops"], case["roofline"]["ivtp"]
    rows = []
    for part, seconds in ivtp.items():
        whole = flops["none"].get(part)
        name = "select + reduce" if part == "pruner" else part.replace("_", " ")
        left = f"{100 * flops['ivtp'].get(part, 0) / whole:.1f} %" if whole else ""
        bound = _ms(roof[part]) if part in roof else ""
        rows.append([name, _ms(none[part]), _ms(seconds), left, bound, f"{100 * lost[part]:+.1f} %"])
    heads = ["", "unpruned ms", "pruned ms", "FLOPs left", "roofline ms", "beyond FLOPs, of the whole"]
    return Table(f"{_case(case)}: where the time goes", heads, rows)


def _operators(case: dict) -> Table:
    unpruned, ivtp = case["operators"]["unpruned"], case["operators"]["ivtp"]
    rows = [
        [name, *(_ms(seconds[name]) if name in seconds else "" for seconds in (unpruned, ivtp))]
        for name in dict.fromkeys([*unpruned, *ivtp])
    ]
    return Table(f"{_case(case)}: the longest operators, profiled once", ["", "unpruned ms", "pruned ms"], rows)


def _decoding(record: dict) -> Table:
    rows = [
        [_model(part), name, _interval(value, 1e3), ""]
        for part in record["decoding"]
        for name, value in part["token"].items()
    ]
    rows += [[_model(f), "speed-up", _interval(f["speedup"]), f"{f['steps']} tokens"] for f in record["decoding"]]
    return Table("A generated token", ["", "", "ms; median [95 %]", ""], rows)


def _throughput(part: dict) -> Table:
    rows = [
        [name, f"batch {size}", *(f"{value:.4g}" for value in orders.values())]
        for name, sizes in part["images_per_second"].items()
        for size, orders in sizes.items()
    ]
    title = f"{_model(part)}: images per second, {part['images']} prompts of up to {part['text']} text tokens"
    return Table(title, ["", "", "of one length", "of several, as they come", "of several, sorted"], rows)


def _peers(record: dict) -> Table:
    rows = [
        [
            _model(part),
            name,
            _interval(value, 1e3),
            _interval(part["over_sdpa"][name]),
            f"{part['peak_bytes'][name] / 1e6:.0f}",
            f"{part['cache_bytes'][name] / 1e6:.1f}",
        ]
        for part in record["peers"]
        for name, value in part["seconds"].items()
    ]
    return Table("Prefill of peer methods", ["", "", "ms", "over SDPA", "peak MB", "KV cache MB"], rows)


def _methods(part: dict) -> Table:
    rows = [
        [
            name,
            _interval(row["seconds"], 1e3),
            _interval(row["speedup"]),
            f"{row['promised']:.3g}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['cache_bytes'] / 1e6:.0f}",
        ]
        for name, row in part["rows"].items()
    ]
    heads = ["method, visual tokens", "ms; median [95 %]", "speed-up", "promised by FLOPs", "peak MB", "KV cache MB"]
    return Table(f"{_case(part)}: prefill of methods", heads, rows)


def _end_to_end(part: dict) -> Table:
    rows = []
    for name in ("unpruned", "ivtp"):
        rates, over = part[name]["images_per_second"], part[name]["over_model"]
        rows.append([name, "the model alone", f"{rates['model']:.4g}", ""])
        rows += [[name, f"workers={n}", f"{rates[n]:.4g}", _interval(value)] for n, value in over.items()]
    one = part["ivtp"]
    title = (
        f"{_model(part)}: from JPEG files to {part['tokens']} tokens, {one['images']} images, batches of {one['batch']}"
    )
    return Table(title, ["", "", "images per second", "over the model alone"], rows)


def _sums(rows: list[dict]) -> Table:
    heads = ["tokens", "ms", "ms from the map", "times faster", "MB", "MB of the map", "error of the largest"]
    return Table(
        "Weighted column sums of a causal attention, 32 heads of 128",
        heads,
        [
            [
                str(row["n"]),
                _interval(row["seconds"]["sums"], 1e3),
                _interval(row["seconds"]["dense"], 1e3),
                _interval(row["dense_over_sums"]),
                f"{row['peak_bytes']['sums'] / 1e6:.4g}",
                f"{row['peak_bytes']['dense'] / 1e6:.4g}",
                f"{row['error']['sums']:.1e}",
            ]
            for row in rows
        ],
    )


def _pipeline(record: dict) -> Table:
    rows = []
    for name, part in record.items():
        rates = part["images_per_second"]
        rows.append([name, "the model alone", f"{rates['model']:.4g}", ""])
        for workers, over in part["over_model"].items():
            rows.append([name, f"workers={workers}", f"{rates[workers]:.4g}", _interval(over)])
    part = next(iter(record.values()))
    title = f"Images per second of the loop: {part['images']} images, batches of {part['batch']}"
    return Table(title, ["processor", "", "images per second", "over the model alone; median [95 %]"], rows)


def _rollout(part: dict) -> Table:
    """Table of dense maps, the streamed score, and the score's bound: the products that every exact score needs."""
    states = {"": part} | ({"heap emptied before": part["empty_heap"]} if part["empty_heap"] else {})
    rows = [
        [name, state, _interval(value, 1e3), f"{run['seconds']['dense']['median'] / value['median']:.3g}"]
        for state, run in states.items()
        for name, value in run["seconds"].items()
    ]
    title = f"A group's rollout: {part['n']} tokens, {part['heads']} heads, {part['layers']} layers"
    return Table(title, ["", "", "ms; median [95 %]", "times faster than dense"], rows)
