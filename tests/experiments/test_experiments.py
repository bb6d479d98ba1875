"""Every experiment as it ships: its YAML, its README, its cost on the large models, and what a run of it leaves behind."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from helpers.running import lines, outcomes, run

from ivtp.cost import main
from ivtp.experiment.config import ConfigError, load_config
from ivtp.experiment.costs import closed_form
from ivtp.experiment.run import check_claims
from ivtp.experiment.variants import variants
from ivtp.registry import UnknownName
from ivtp.report import paper
from ivtp.report.costs import tables
from ivtp.report.others import of_the_paper
from ivtp.results import Result

ROOT = Path(__file__).parent.parent.parent
YAMLS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
NAMES = [path.stem for path in YAMLS]
ASKED = {
    "table1", "table2", "table3", "table4_score", "table5_combine", "table6_instruction", "table7_llm_side",
    "ablation_groupsize", "ablation_tau", "table9_cost", "figure3", "figure4", "figure5", "position_ids", "split",
}  # fmt: skip


MODELS = {
    "vision_only": ("tiny_clip", "vit_large_336", "eva02", "siglip_base"),
    "vision_emoji": ("dinov2_small", "vit_large_336"),
    "vision_fashion": ("dinov2_small", "vit_large_336"),
}
"""Of experiments without a language model."""


@cache
def shape(model: str):
    from ivtp.experiment.planning import build_shape

    return build_shape(load_config([f"model={model}"]))


def rows(name: str, *overrides: str) -> list[dict]:
    return list(variants(load_config([f"experiment={name}", *overrides])))


def test_every_table_and_figure_is_there():
    assert set(NAMES) >= ASKED


@pytest.mark.parametrize("path", YAMLS, ids=NAMES)
def test_an_experiment_asks_a_question_in_its_first_line_and_has_a_folder(path):
    package, question = path.read_text().splitlines()[:2]
    assert package == "# @package _global_" and question.startswith("# ") and ("?" in question or ":" in question)
    readme = (ROOT / "experiments" / path.stem / "README.md").read_text()
    parts = ("**Question.**", f"experiment={path.stem}", "**Rows.**", "**How to read it.**")
    for part in (*parts, "<!-- result -->", "<!-- /result -->"):
        assert part in readme


@pytest.mark.parametrize("name", NAMES)
def test_its_rows_claims_and_rows_of_the_paper_exist(name):
    config, found = load_config([f"experiment={name}"]), rows(name)
    paper.check(config.paper, found)
    check_claims(config, found)
    assert config.name == name and found[0]["pruner"]["name"] == "none"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (n, m)
        for n in NAMES
        for m in MODELS.get(n, ("tiny", "llava_1_5_7b"))
        if n not in ("figure4", "ablation_groupsize")
    ]
    + [("table2", "llava_1_5_13b")],
)
def test_its_rows_can_be_planned_on_every_model(name, model):
    """No weights are read. Rows of one section that are to cost the same do so within 2 %."""
    found = closed_form(model, rows(name), shape(model), [512], None)
    assert len({record["label"] for record in found}) == len(found) >= 4
    by = {record["label"]: record for record in found}
    for row in rows(name):
        target = row["budget"].get("like")
        if target and not row["seeds_of"]:
            assert by[row["label"]]["tflops"]["total"] == pytest.approx(by[target]["tflops"]["total"], rel=0.02)


def test_table4_and_table5_compare_scores_at_one_cost():
    for name in ("table4_score", "table5_combine"):
        found = closed_form("llava_1_5_7b", rows(name), shape("llava_1_5_7b"), [512], None)
        both = [r["tflops"]["total"] for r in found if r["section"] == "both sites"]
        assert len(both) >= 3 and max(both) / min(both) < 1.001 and both[0] == pytest.approx(8.2, abs=0.02)


@pytest.mark.parametrize(
    ("text", "whole", "pruned"), [(128, 9.97, 2.99), (256, 11.76, 4.72), (512, 15.40, 8.22), (1024, 22.89, 15.44)]
)
def test_table3_gives_the_predicted_costs(text, whole, pruned):
    made = closed_form("7B", rows("table3"), shape("llava_1_5_7b"), [text], None)
    found = {r["label"]: r["tflops"]["total"] for r in made}
    assert found["unpruned"] == pytest.approx(whole, abs=0.01)
    assert found["ivtp"] == pytest.approx(pruned, abs=0.04)


def test_table9_gives_the_papers_totals_and_its_split():
    found = {r["label"]: r for r in closed_form("7B", rows("table9_cost"), shape("llava_1_5_7b"), [512], None)}
    for record in found.values():
        assert record["tflops"]["total"] == pytest.approx(paper.row(record["paper"])["tflops"], abs=0.12)
    assert found["unpruned"]["tflops"]["vision"] == pytest.approx(0.38, abs=0.005)
    assert found["ivtp"]["tflops"]["language"] == pytest.approx(7.99, abs=0.03)
    assert found["ivtp"]["tflops"]["extra"] == pytest.approx(0.01, abs=0.005)


def test_the_command_prints_all_rows_and_every_text_length(capsys):
    assert main(["experiment=table3", "model=llava_1_5_7b", "text=128,1024", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["label"], r["text"]) for r in found][:2] == [("unpruned", 128), ("topk", 128)] and len(found) == 10
    assert main(["experiment=table3", "model=llava_1_5_7b", "text=128,1024"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"unpruned *│ 9\.9\d* │ 22\.8\d* │", shown)


def test_the_papers_total_stands_only_beside_the_model_it_is_about():
    record = closed_form("llava_1_5_7b", rows("table1"), shape("llava_1_5_7b"), [512], None)
    assert "the paper's total" in tables(record)[0].heads
    assert "the paper's total" not in tables([r | {"model": "llava_1_5_13b"} for r in record])[0].heads
    assert "the paper's total" not in tables([r | {"text": 128} for r in record])[0].heads


# Rows -------------------------------------------------------------------------------------------------------------


def composed(*rows: dict):
    config = load_config([])
    from omegaconf import OmegaConf

    return OmegaConf.merge(config, {"variants": list(rows)})


def test_a_sweep_runs_over_pruners_positions_and_budgets():
    row = {"label": "{pruner} {ratio} {position_ids}", "paper": "figure3/{pruner}"}
    row["sweep"] = {"pruner": ["topk", "fastv"], "ratio": ["1/9", 0.5], "position_ids": ["keep", "renumber"]}
    found = list(variants(composed(row)))
    assert len(found) == 8
    assert found[5]["pruner"]["name"] == "fastv" and found[5]["position_ids"] == "renumber"
    assert found[5]["budget"] == {"ratio": "1/9"} and found[5]["label"] == "fastv 1/9 renumber"
    assert found[5]["paper"] == "figure3/fastv"


def test_seeds_make_rows_that_differ_in_nothing_but_the_seed():
    found = list(variants(composed({"label": "chance", "pruner": "random", "seeds": 3})))
    assert [row["pruner"]["seed"] for row in found] == [0, 1, 2]
    assert [row["seeds_of"] for row in found] == ["chance"] * 3 and len({row["label"] for row in found}) == 3
    for wrong in (
        {"pruner": "topk", "seeds": 3},
        {"pruner": "random", "seeds": 0},
        {"pruner": "random", "seeds": True},
    ):
        with pytest.raises(ConfigError, match="seeds"):
            list(variants(composed({"label": "x", **wrong})))


def test_the_papers_numbers_are_those_of_its_tables():
    for name in ("table1", "table2"):
        for label, row in paper.table(name)["rows"].items():
            assert sum(row["scores"]) / 12 == pytest.approx(row["average"], abs=0.11), label  # as far as it rounds
    assert paper.row("table1/IVTP")["drop"] == -1.0 and [paper.drop("table1/IVTP"), paper.cost("table1/IVTP")] == [
        "-1.0†",
        "53 %",
    ]
    assert [paper.drop("figure3/IVTP/64"), paper.cost("figure3/IVTP/64")] == ["-2.5", "53 %"]
    assert [paper.drop(None), paper.cost(None)] == ["", ""]
    assert [row[0] for row in of_the_paper("table1").lines if "‡" in row[0]] == [
        f"{name} ‡" for name in ("Honeybee", "LLaMA-VID", "Qwen-VL resampler")
    ]
    for wrong in ("table1/IVPT", "tabel1/IVTP"):
        with pytest.raises(UnknownName, match="Did you mean"):
            paper.row(wrong)


# Runs -------------------------------------------------------------------------------------------------------------


@cache
def ran(name: str, *more: str) -> Path:
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    assert run(f"experiment={name}", *more, output=folder) == 0
    return folder / name


def test_vision_only_runs_without_a_language_model_and_says_what_encoders_cost():
    """On real images, offline: the embedded CLIP tells handwritten digits apart by their names."""
    folder = ran("vision_only", "data.limit=6", "viewer=2")
    records = lines(folder / "results.jsonl")
    assert {record["section"] for record in records} == {"", "equal tokens", "equal FLOPs"}
    assert not any(record["cuts"]["language"] or record["tflops"]["language"] for record in records)
    assert all(record["metrics"]["accuracy"]["n"] == 6 and "top5" in record["metrics"] for record in records)
    assert {record["pruner"]["name"] for record in records} >= {"random", "topk", "rollout", "tome", "evit", "ats"}
    table = (folder / "table.md").read_text()
    assert "vit_large_336" in table and "of one image" in table and "text tokens" not in table


def test_a_run_of_table6_says_what_was_asked_and_spent_and_judges_the_claims():
    folder = ran("table6_instruction")
    table = (folder / "table.md").read_text()
    records = lines(folder / "results.jsonl")
    assert len(records) == 6 + 5 + 2  # the random control has five seeds …
    assert (
        table.count("random in the LLM") == 4
    )  # … and one line in the table, by difficulty, and in the costs of 7B and 13B
    assert "11.1 % of the tokens" in table and " sd" in table and "average tokens" in table
    stated_claims = load_config(["experiment=table6_instruction"]).claims
    for claim, stated in zip(json.loads((folder / "claims.json").read_text()), stated_claims, strict=True):
        assert claim["claim"] == stated.claim and claim["agrees"] in ("yes", "no", "not significant")
        low, high = claim["interval"]
        assert low <= claim["difference"] <= high
    assert "The paper's own numbers" in table and "60.5" in table
    compared = json.loads((folder / "comparisons.json").read_text())
    flips = compared["last token"]["OTT+TE+RT"]["flips"]
    by = {record["label"]: {o["id"]: o for o in outcomes(folder, record)} for record in records}
    expected = [i for i, o in by["last token"].items() if o["correct"] and not by["OTT+TE+RT"][i]["correct"]]
    assert sorted(flips["gained"]) == sorted(expected)


def test_the_oracle_covers_what_is_asked_wherever_the_vision_stage_left_it():
    folder = ran("table6_instruction")
    by = {record["label"]: record for record in lines(folder / "results.jsonl")}
    oracle, guided = by["the asked object (oracle)"]["metrics"], by["OTT+TE+RT"]["metrics"]
    assert oracle["target_share"]["mean"] > guided["target_share"]["mean"]
    assert oracle["hit_rate"]["mean"] >= guided["hit_rate"]["mean"]


def test_shared_work_changes_no_outcome(tmp_path):
    """The whole sweep with and without sharing, and one of its rows alone: the same answers, words and kept tokens."""
    assert run("experiment=ablation_tau", "trainer.share_mib=0", output=tmp_path / "not shared") == 0
    assert run("pruner=ivtp", "pruner.tau=0.1", output=tmp_path / "alone") == 0
    shared, apart = ran("ablation_tau"), tmp_path / "not shared" / "ablation_tau"
    ours, theirs = lines(shared / "results.jsonl"), lines(apart / "results.jsonl")
    assert [r["speed"]["shared"] for r in ours] == [False, False, *[True] * 7]
    assert not any(r["speed"]["shared"] for r in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert outcomes(shared, a) == outcomes(apart, b) and a["metrics"] == b["metrics"]
    alone = tmp_path / "alone" / "run"
    swept = next(r for r in ours if r["label"] == "τ 0.1")
    assert outcomes(alone, lines(alone / "results.jsonl")[1]) == outcomes(shared, swept)


def test_tau_lets_fewer_words_pass_as_it_rises():
    found = [r["words"] for r in lines(ran("ablation_tau") / "results.jsonl") if "words" in r]
    passing = [words["passing"] for words in found]
    assert len(passing) == 8 and passing == sorted(passing, reverse=True) and passing[0] > passing[-1] == 0
    assert found[0]["none"] == 0 and found[-1]["none"] == 1


def test_table9_counts_what_the_closed_form_says_and_takes_time():
    records = lines(ran("table9_cost") / "results.jsonl")
    assert [r["label"] for r in records] == ["unpruned", "topk", "tome", "ivtp"]  # the resampler cannot run
    for record in records:
        assert record["counted"]["counted"] == record["counted"]["closed"]
        assert record["speed"]["parts"]["language"] > 0 and not record["speed"]["shared"]
        known = {"vision", "projector", "text_encoder", "language", "pruner"}
        assert set(record["speed"]["parts"]) <= known
    assert "resampler" in (ran("table9_cost") / "table.md").read_text()


def test_table3_needs_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("ivtp.experiment.planning.build_model", lambda *_: pytest.fail("a model was loaded"))
    assert run("experiment=table3", output=tmp_path) == 0
    table = (tmp_path / "table3" / "table.md").read_text()
    assert re.search(r"\| unpruned \| 9\.9\d* \| 11\.7\d* \| 15\.4 \| 22\.89", table)
    assert "llava_1_5_13b" in table


def test_figure5_shows_several_questions_about_one_image(monkeypatch, tmp_path):
    from transformers import AutoImageProcessor

    from ivtp.backbones.loading.hub import EMBEDDED
    from ivtp.data.scenes2 import Scenes2
    from ivtp.report.plots import kept_tokens

    data, shown, images_of = Scenes2("test", 3), [], AutoImageProcessor.from_pretrained(EMBEDDED["tiny"])
    monkeypatch.setattr("ivtp.report.plots.overlay", lambda image, *_: (shown.append(image.tobytes()), image)[1])
    answers = [{"id": data[i]["id"], "kept": [1], "correct": True, "prediction": "x"} for i in range(len(data))]
    rows = [Result(label="ivtp", tokens=[324, 1])]
    for one_image, images in ((True, 1), (False, 3)):
        shown.clear()
        kept_tokens(rows, {"ivtp": answers}, data, images_of, tmp_path / "x.png", one_image)
        assert len(shown) == 5 and len(set(shown)) == images


# Collecting ---------------------------------------------------------------------------------------------------------


def collected(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("collect", ROOT / "experiments" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_results_are_collected_and_the_claims_are_written_from_them(tmp_path, monkeypatch):
    module = collected(tmp_path, monkeypatch)
    (tmp_path / "README.md").write_text("before\n<!-- claims -->\nold\n<!-- /claims -->\nafter\n")
    (tmp_path / "table6_instruction").mkdir()
    readme = tmp_path / "table6_instruction" / "README.md"
    readme.write_text("# x\n<!-- result -->\nold\n<!-- /result -->\nend\n")
    source = ran("table6_instruction")
    for _ in range(2):  # a second time changes nothing
        assert module.main([str(source.parent), "table6_instruction"]) == 0
        written, text = (tmp_path / "README.md").read_text(), readme.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "\nold\n" not in written + text
    assert written.count("[table6_instruction](table6_instruction/README.md)") == 5 and "+2.9" in written
    assert text.endswith("end\n") and "[table.md](table.md)" in text and "| OTT+TE+RT |" not in text
    table = (tmp_path / "table6_instruction" / "table.md").read_text()
    assert "| OTT+TE+RT |" in table and "## Claims of the paper" in table
    for record in lines(tmp_path / "table6_instruction" / "results.jsonl"):
        assert record["label"]
    assert all(p.stat().st_size <= 300_000 for p in (tmp_path / "table6_instruction").glob("*.png"))


def test_collecting_what_was_not_run_is_said(tmp_path, monkeypatch, capsys):
    assert collected(tmp_path, monkeypatch).main([str(tmp_path), "table1"]) == 2
    assert "run experiment=table1 first" in capsys.readouterr().err
