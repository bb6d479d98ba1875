"""`python -m ivtp.run` is a Hydra program: flags, overrides, configs of one's own; and every refusal is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import is_dataclass

import pytest
from helpers.running import ROOT, environment, lines, one_line, run, spawn

from ivtp.experiment import schema
from ivtp.experiment.catalogue import _of_function, shipped
from ivtp.experiment.config import load_config, options
from ivtp.registry import UserError


@pytest.fixture
def refused(capfd):
    """Run what cannot be done; the line it says on standard error."""

    def go(*arguments: str) -> str:
        capfd.readouterr()
        status = run(*arguments, quick=False)
        error = capfd.readouterr().err
        assert status == 2, error
        return one_line(error)

    return go


@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_help_and_config_are_there_at_once(flag, tmp_path):
    """Within two seconds of a processor: neither waits for torch, of which pruners are made."""
    code = (
        "import sys, time\nfrom ivtp.run import main\n"
        f"assert main([{flag!r}, 'experiment=zoo']) == 0\n"
        "assert not {'torch', 'transformers', 'lightning', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 2
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_key_with_its_whole_text(capsys):
    assert run("--help", quick=False) == 0
    shown = capsys.readouterr().out
    for keys in schema.KEYS.values():
        for key in keys:
            assert is_dataclass(key.kinds[0]) or key.about in shown, key.name
    assert "trainer.batch_size=50  samples of a batch [at least 1]" in shown


def test_pruners_are_read_from_their_source_as_they_are_in_the_registry():
    from ivtp.pruners import PRUNERS, shipped_pruners

    assert list(shipped()) == shipped_pruners()
    for name, option in shipped().items():
        assert option == _of_function(name, PRUNERS[name])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+seeds=3"], ["unknown key 'seeds'", "Did you mean 'seed'?"]),
        (["pictures=questions"], ["key 'pictures' is called 'kept_tokens' now"]),
        (["++trainer.batchsize=3"], ["Did you mean 'trainer.batch_size'?"]),
        (["+pruner.tua=3"], ["unknown key 'pruner.tua'"]),
        (["~seed"], ["'~seed'", "every run needs this key"]),
        (["~pruner"], ["choose one with pruner=NAME"]),
        (["~experiment=zoo"], ["Could not delete"]),
        (["hydra.jobb.name=x"], ["hydra.jobb"]),
        (["-m", "hydra/launcher=ray", "seed=1"], ["unknown hydra/launcher 'ray'", "pip install 'ivtp[sweep]'"]),
        (["+seed=3"], ["An item is already at 'seed'", "remove + prefix: 'seed=3'"]),
        (["--sed=3"], ["unknown key 'sed'", "Did you mean 'seed'?"]),
        (["--sweep"], ["unknown flag '--sweep'"]),
        (["--cfg", "jobs"], ["invalid choice: 'jobs'"]),
        (["pruner=topk,tome"], ["'pruner=topk,tome' has several values", "add -m", "pruner=[a,b]"]),
        (["-m", "pruner=topk,tomme"], ["unknown pruner 'tomme'", "Did you mean 'tome'?"]),
        (["-m", "trainer.batch_size=1,0"], ["trainer.batch_size=0 must be a whole number of at least 1"]),
        (["-m", "seed=1", "+foo=1,2"], ["unknown key 'foo'"]),
        (["--config-dir", "/none/such"], ["/none/such", "not found"]),
        (["hydra.searchpath=[file:///none/such]"], ["/none/such", "there is no folder"]),
        (["--experimental-rerun", "job.pickle"], ["opens a pickle"]),
        (["trainer=eight_gpus"], ["unknown trainer 'eight_gpus'"]),
        (["trainer.device=cuda:one"], ["trainer.device=cuda:one is not one of auto, cpu, cuda, cuda:N"]),
        (["trainer.devices=some"], ["trainer.devices=some must be a whole number of at least 1, or auto"]),
        (["plugins=mine.py"], ["plugins=mine.py must be a list, as in plugins=[mine.py]"]),
        (["plugins=[mine.py]"], ["mine.py", "does not exist"]),
        (["--cfg", "job", "trainer.batch_size=many"], ["trainer.batch_size=many must be a whole number"]),
        (["logger=[wandb,cvs]"], ["unknown logger 'cvs'", "Did you mean 'csv'?"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in value else None,
)
def test_what_hydra_would_trace_or_ignore_is_one_line(refused, arguments, said):
    line = refused(*arguments)
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--seed=3", "--cfg", "job", "--package", "seed"], "3"),
        (["seed=3", "--cfg=job", "-p", "seed", "data.limit=2"], "3"),
        (["--cfg=job", "-p", "data.judge", "data=mmvet", "+data.judge.MODEL_VERSION=gpt"], "MODEL_VERSION: gpt"),
        (["--cfg=job", "-p", "data.judge", "data=mmvet", "data.judge={MODEL_VERSION: gpt}"], "MODEL_VERSION: gpt"),
        (["--cfg=job", "-p", "data.prompt", "data=mmvet", "data.prompt={ocr: true}"], "pre_prompt: ''\nocr: true"),
        (["--cfg=job", "-p", "data.prompt", "data=mmvet", "data.prompt.pre_prompt=x"], "pre_prompt: x"),
        (["--cfg=job", "-p", "trainer.devices", "trainer.devices=auto"], "auto"),
        (["--cfg=job", "-p", "logger", "logger=[csv,tensorboard]"], "csv: true"),
        (["--cfg=hydra", "-p", "hydra.run", "hydra.run.dir=here/${name}"], "dir: here/${name}"),
        (["~debug", "--cfg=job", "-p", "name"], "run"),
    ],
)
def test_flags_and_overrides_mean_what_they_mean_in_hydra(arguments, shown, capsys):
    assert run(*arguments, quick=False) == 0
    assert shown in capsys.readouterr().out


def test_hydra_says_where_configs_come_from(tmp_path):
    done = spawn("--info", "searchpath", "--config-dir", str(tmp_path))
    assert done.returncode == 0 and f"| command-line | file://{tmp_path}" in done.stdout, done.stderr


@pytest.fixture
def own(tmp_path):
    """Configs of one's own: an experiment, a model, data; outside of the checkout."""
    for group in ("experiment", "model", "data"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "model" / "small.yaml").write_text("# Mine.\ndefaults: [tiny]\ndtype: float32\n")
    (tmp_path / "mine" / "data" / "few.yaml").write_text("# Few scenes.\ndefaults: [scenes2]\nscenes: 3\n")
    (tmp_path / "mine" / "experiment" / "first.yaml").write_text(
        "# @package _global_\n# Is it any good?\ndefaults:\n  - override /model: small\n  - override /data: few\n"
        "name: first\ncosts: {models: [small]}\nvariants: [{label: unpruned, pruner: none}, {label: ours}]\n"
    )
    return tmp_path / "mine"


def test_experiments_models_and_data_of_ones_own_are_options_like_ours(own, capsys):
    for where in (["--config-dir", str(own)], [f"hydra.searchpath=[file://{own}]"]):
        assert run("--cfg=job", "--resolve", "experiment=first", *where, quick=False) == 0
        shown = capsys.readouterr().out
        assert "dtype: float32" in shown and "scenes: 3" in shown
    assert run("--help", "--config-dir", str(own), quick=False) == 0
    assert "first                Is it any good?" in capsys.readouterr().out
    config = load_config(["experiment=first"], folders=[own])
    assert config.question == "Is it any good?" and config.data.scenes == 3
    with pytest.raises(UserError, match="Did you mean 'first'"):
        load_config(["experiment=fist"], folders=[own])
    assert "small" in options("model", [own]) and "small" not in options("model")


def test_such_an_experiment_runs_and_knows_its_question(own, tmp_path, capsys):
    """Its cost on a model of one's own too, for which another config is composed inside of the job."""
    arguments = ["--config-dir", str(own), "experiment=first", "data.limit=2"]
    assert run(*arguments, "costs.models=[small]", output=tmp_path) == 0, capsys.readouterr().err
    folder = tmp_path / "first"
    assert len(lines(folder / "results.jsonl")) == 2
    assert {line["model"] for line in lines(folder / "costs.jsonl")} == {"small"}
    assert "Is it any good?" in (folder / "report.html").read_text()
    assert "scenes: 3" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {batchsize: 3}", "unknown key 'trainer.batchsize'. Did you mean 'trainer.batch_size'?"),
        ("trainer: {batch_size: many}", "trainer.batch_size: Value 'many'"),
        ("trainer: {batch_size: 0}", "trainer.batch_size=0 must be a whole number of at least 1"),
        ("position_ids: kept", "position_ids=kept is not one of keep, renumber"),
        ("varaints: []", "Did you mean 'variants'?"),
        ("pictures: questions", "key 'pictures' is called 'kept_tokens' now"),
        ("defaults: [{override /model: smal}]", "unknown model 'smal'"),
    ],
)
def test_what_is_wrong_in_a_file_of_ones_own_is_named(own, refused, text, said):
    (own / "experiment" / "wrong.yaml").write_text(f"# @package _global_\n{text}\n")
    assert said in refused("--config-dir", str(own), "experiment=wrong", f"output={own}")


def test_completion_offers_options_and_keys(monkeypatch, capsys):
    for line, offered in (("ivtp pruner=iv", "pruner=ivtp"), ("ivtp trainer.bat", "trainer.batch_size=")):
        monkeypatch.setitem(os.environ, "COMP_LINE", line)
        assert run("-sc", "query=bash", quick=False) == 0
        assert offered in capsys.readouterr().out


PRUNER = '''
import ivtp
from ivtp.core.scores import Random


@ivtp.register_pruner
def {name}(shape, keep: int, layer: int = 0) -> ivtp.Plan:
    """Random choice after one layer."""
    return ivtp.Plan(vision=ivtp.Stage((ivtp.Cut(layer, keep, "block"),), Random(0)))
'''


def test_a_pruner_from_a_file_is_an_option_and_its_source_part_of_the_result(tmp_path, capsys):
    """An edit of the file makes a new result; the unpruned row stays."""
    plugin = tmp_path / "my_pruner.py"
    arguments = ["-m", "ivtp.run", f"plugins=[{plugin}]", "pruner=mine", "pruner.layer=3", "budget.keep=9"]
    arguments += ["data.limit=2", "logger=none", f"output={tmp_path}"]
    for text in (PRUNER, PRUNER + "\n# Another thought.\n"):
        plugin.write_text(text.format(name="mine"))
        env = environment(PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "run" / "results.jsonl")
    assert [row["label"] for row in rows] == ["unpruned", "mine", "mine"]
    assert rows[1]["pruner_source"] != rows[2]["pruner_source"] and rows[1]["key"] != rows[2]["key"]
    assert rows[1]["cuts"]["vision"] == [[3, 9, "block"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:\n", "SyntaxError"),
        ("raise RuntimeError('no\\nluck')\n", r"RuntimeError: no\nluck"),
        ("x = 1\n", "registers no pruner"),
        (PRUNER.format(name="ivtp"), "'ivtp' is already registered"),
    ],
)
def test_a_plugin_that_is_none_is_refused_in_one_line(tmp_path, refused, text, said):
    plugin = tmp_path / f"plugin_{abs(hash(text))}.py"
    plugin.write_text(text)
    assert said in refused(f"plugins=[{plugin}]", "--cfg=job")


def test_a_dry_run_says_cuts_cost_samples_and_time_and_writes_nothing(tmp_path, capsys, monkeypatch):
    from ivtp import results as store

    monkeypatch.setattr("ivtp.experiment.planning.load_model", None)  # no weights
    arguments = ["pruner=ivtp", "data.limit=7", "dry_run=true"]
    assert run(*arguments, output=tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "ViT 2:225 5:156 8:108 11:75, LLM 2:52 5:36" in shown
    assert "2 rows × 7 samples: unknown" in shown
    assert not (tmp_path / "out").exists()
    speed = {"questions_per_second": 1.0}
    earlier = store.Result(label="x", model={"source": "tiny"}, tflops={"total": 0.01}, text_tokens=9, speed=speed)
    store.append_results(tmp_path / "out" / "other" / "results.jsonl", [earlier])
    assert run(*arguments, output=tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "9 text tokens" in shown and "unknown" not in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]
