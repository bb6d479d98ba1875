"""Every YAML composes and can be planned; keys reach where they should; what is misspelt is named."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ivtp.experiment.config import FOLDER, GROUPS, ConfigError, load_config, options, pruner_defaults
from ivtp.experiment.variants import variants
from ivtp.pruners import list_pruners, register_pruner
from ivtp.registry import UnknownName, UserError

YAMLS = sorted(path.relative_to(FOLDER).with_suffix("") for path in FOLDER.glob("*/*.yaml"))
NEEDED = {
    "data=folder": ["data.path=somewhere"],
    "data=lmms": ["data.task=pope"],
    "data=imagefolder": ["data.path=somewhere"],
    "data=hub_images": ["data.path=somewhere"],
}


def test_there_are_yamls_and_each_belongs_to_a_group_that_can_be_chosen():
    assert len(YAMLS) > 15
    assert {path.parts[0] for path in YAMLS} <= set(GROUPS)


@pytest.mark.parametrize("choice", [f"{p.parts[0]}={p.name}" for p in YAMLS] + [f"pruner={n}" for n in list_pruners()])
def test_every_option_composes_and_its_rows_can_be_planned(choice):
    from ivtp.experiment.planning import build_shape, plan_rows

    config = load_config([choice, *NEEDED.get(choice, [])])
    assert not OmegaConf.missing_keys(config)
    if (
        choice.startswith("model=") and "library" in config.model
    ):  # an encoder has no language model for ivtp to prune in
        config = load_config([choice, "pruner=rollout"])
    rows = list(variants(config))
    assert rows
    planned = plan_rows(rows, build_shape(config), 12, 10)
    assert [row.label for row in planned] == [row["label"] for row in rows]
    assert all(row.cost.total > 0 for row in planned)
    if config.compare_to is not None:
        assert config.compare_to in {row.seeds_of or row.label for row in planned}


@pytest.mark.parametrize("group", ["model", "data", "pruner", "experiment"])
def test_every_option_says_what_it_is_where_it_is_chosen_by_name(group):
    assert len(options(group)) > 5
    for name, about in options(group).items():
        assert about, f"{group}={name} needs a first line, `# what it is` of its file or of its docstring"


def test_every_pruner_can_be_chosen_and_its_config_has_its_own_settings():
    import inspect

    from ivtp.pruners import PRUNERS

    for name in list_pruners():
        assert load_config([f"pruner={name}"]).pruner.name == name
        parameters = inspect.signature(PRUNERS[name]).parameters
        assert set(pruner_defaults(name)) - {"name"} <= set(parameters), name


def test_the_defaults_of_a_config_are_those_of_the_function():
    """`pruner=ivtp` on the command line and `ivtp.prune(model, "ivtp")` are the same method."""
    import inspect

    from ivtp.pruners import PRUNERS

    for name in list_pruners():
        parameters = inspect.signature(PRUNERS[name]).parameters
        for key, value in pruner_defaults(name).items():
            if key != "name" and value != "${seed}":
                assert value == parameters[key].default, f"{name}: {key}"


def test_a_key_of_the_pruner_reaches_all_rows_of_that_pruner():
    rows = list(variants(load_config(["experiment=ablation_groupsize", "pruner.tau=0.35"])))
    assert {row["pruner"].get("tau") for row in rows if row["pruner"]["name"] == "ivtp"} == {0.35}
    assert len(rows) > 10


def test_a_sweep_makes_one_row_for_each_combination():
    config = load_config(["variants=[{label: 'g {group} t {tau}', sweep: {group: [2, 3], tau: [0.1, 0.2]}}]"])
    found = [(row["label"], row["pruner"]["group"], row["pruner"]["tau"]) for row in variants(config)]
    assert found == [("g 2 t 0.1", 2, 0.1), ("g 2 t 0.2", 2, 0.2), ("g 3 t 0.1", 3, 0.1), ("g 3 t 0.2", 3, 0.2)]


def test_a_row_may_take_another_method_with_that_method_s_own_settings():
    config = load_config(["variants=[{label: a, pruner: tome}, {label: b, group: all}]", "pruner.tau=0.3"])
    other, ours = variants(config)
    assert other["pruner"] == pruner_defaults("tome")
    assert (ours["pruner"]["name"], ours["pruner"]["group"], ours["pruner"]["tau"]) == ("ivtp", "all", 0.3)


def test_the_seed_reaches_the_random_pruner_of_a_row():
    (row,) = variants(load_config(["variants=[{label: a, pruner: random}]", "seed=7"]))
    assert row["pruner"]["seed"] == 7


def test_debug_limit_applies_to_any_data():
    assert load_config(["debug=limit"]).data.limit == 20
    assert load_config(["debug=limit", "data=folder", "data.path=x"]).data.limit == 20
    assert load_config(["debug=limit", "data.limit=3"]).data.limit == 3


def test_a_third_party_pruner_is_chosen_with_the_defaults_of_its_function():
    from ivtp.core.plan import Plan
    from ivtp.pruners import PRUNERS

    def somebodys(shape, keep: int, strength: float = 0.5) -> Plan:
        """From a wheel of somebody else."""
        return Plan()

    register_pruner(somebodys)
    try:
        assert load_config(["pruner=somebodys", "pruner.strength=0.75"]).pruner == {
            "name": "somebodys",
            "strength": 0.75,
        }
        assert options("pruner")["somebodys"] == "From a wheel of somebody else."
    finally:
        del PRUNERS._functions["somebodys"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experiment=ablation_group", "Did you mean 'ablation_groupsize'?"),
        ("pruner=ivtpp", "Did you mean 'ivtp'?"),
        ("model=tinny", "Did you mean 'tiny'?"),
        ("pruner.tua=0.3", "Did you mean 'pruner.tau'?"),
        ("trainer.batchsize=3", "Did you mean 'trainer.batch_size'?"),
        ("logger.sample=3", "Did you mean 'logger.samples'?"),
        ("pruner=null", "unknown pruner 'null'"),
    ],
)
def test_did_you_mean(override, said):
    with pytest.raises(UnknownName, match="unknown") as raised:
        load_config([override])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--multirun", "'--multirun' is not of the form key=value"),
        ("pruner.tau='x", "cannot be read as key=value"),
        ("data.limit=0", "data.limit=0 must be a whole number of at least 1, or null"),
        ("data.limit=2.5", "data.limit=2.5 must be a whole number"),
        ("data.scenes=many", "data.scenes=many must be a whole number of at least 1"),
        ("data.scenes=true", "data.scenes=True must be a whole number"),
        ("data.max_new_tokens=0", "data.max_new_tokens=0 must be"),
        ("trainer.batch_size=0", "trainer.batch_size=0 must be"),
        ("trainer.threads=-1", "trainer.threads=-1 must be"),
        ("trainer.vision_batch=0", "trainer.vision_batch=0 must be a whole number of at least 1, or null"),
        ("trainer.sort=3", "trainer.sort=3 is not one of false, true"),
        ("trainer.pack=yes please", "trainer.pack=yes please is not one of false, true"),
        ("trainer.compile=fast", "trainer.compile=fast is not one of null, default, reduce-overhead"),
        ("trainer.device=gpu", "trainer.device=gpu is not one of auto, cpu, cuda"),
        ("model.dtype=half", "model.dtype=half is not one of"),
        ("position_ids=kept", "position_ids=kept is not one of keep, renumber"),
        ("model.prompt=null", "model.prompt=None must be a text"),
        ("model.source=''", "model.source='' must be a text"),
        ("output=null", "output=None must be a text"),
        ("seed=-1", "seed=-1 must be"),
        ("name=../elsewhere", "name='../elsewhere' must be the name of one folder"),
        ("budget=16", "budget=16 must name its kind"),
        ("data=folder", "data.path has no value"),
        ("variants=[{label: a, sweep: {pruner: '${pruners_except:nane}'}}]", "Did you mean 'none'?"),
    ],
)
def test_a_value_that_no_run_could_use_is_named_with_its_bound(override, said):
    with pytest.raises(ConfigError) as raised:
        load_config([override])
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_parts_of_one_graph_cannot_be_timed():
    """Its seconds per part would all be zero."""
    with pytest.raises(ConfigError, match=r"trainer\.compile=default: one graph has no parts"):
        load_config(["trainer.compile=default", "measure=true"])


def test_packed_weights_cannot_be_compiled():
    """torch would say so after minutes, in a hundred lines."""
    with pytest.raises(ConfigError, match=r"trainer\.compile=default: torch\.compile cannot read the weights"):
        load_config(["trainer.compile=default", "trainer.pack=true"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("3", "must be a list of rows"),
        ("[3]", "row 1 of variants"),
        ("[{pruner: ivtp}]", "must have a text `label`"),
        ("[{label: a}, {label: a}]", "two rows are labelled 'a'"),
        ("[{label: '{x}'}]", "'x' is not a key of its sweep"),
        ("[{label: a, sweep: {group: 3}}]", "each with a list of values"),
        ("[{label: a, sweep: {groups: [3]}}]", "Did you mean 'group'?"),
        ("[{label: a, tua: 3}]", "Did you mean 'tau'?"),
        ("[{label: a, pruner: ivtpp}]", "Did you mean 'ivtp'?"),
        ("[{label: a, pruner: {name: ivtp}}]", "pruner={'name': 'ivtp'} must be the name of a pruner"),
        ("[{label: a, pruner: [ivtp]}]", "must be the name of a pruner, with its settings beside it"),
        ("[{label: '{pruner}', sweep: {pruner: [{name: ivtp}]}}]", "the pruners of its sweep must be names"),
        ("[{label: a, sweep: {3: [1]}}]", "must name its settings by texts"),
        ("[{label: a, section: [b]}]", "section=['b'] must be a text"),
        ("[{label: a, stand_in: {name: resampler}}]", "stand_in={'name': 'resampler'} must be the name of a method"),
        ("[{label: a, budget: {keeep: 3}}]", "Did you mean 'keep'?"),
        ("[{label: a, budget: 16}]", "must name its kind"),
        ("[{label: a, budget: {keep: 3, tflops: 1}}]", "both given"),
    ],
)
def test_rows_that_cannot_be_are_named(rows, said):
    with pytest.raises(UserError) as raised:
        list(variants(load_config([f"variants={rows}"])))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "claim",
    ["a is better", "{claim: a is better}", "{claim: x, rows: [a]}", "{rows: [a, b]}", "{claim: x, rows: [a, {b: c}]}"],
)
def test_a_claim_is_about_two_rows(claim):
    with pytest.raises(ConfigError, match=r"must be \{claim: TEXT, rows: \[BETTER, WORSE\], paper: POINTS\}"):
        load_config([f"claims=[{claim}]"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("trainer.device=cuda:1 trainer.devices=2", "trainer.device=cuda:1 is one device, but trainer.devices=2"),
        ("trainer.device=cpu trainer.accelerator=gpu", "trainer.device=cpu is no trainer.accelerator=gpu"),
        ("trainer.precision=16", "trainer.precision=16 is not one of null, 32-true, 16-mixed, bf16-mixed"),
        ("trainer.workers=-1", "trainer.workers=-1 must be a whole number of at least 0, or null"),
        ("trainer.cache_mib=half", "trainer.cache_mib=half must be a whole number of at least 0"),
        ("trainer.num_nodes=0", "trainer.num_nodes=0 must be a whole number of at least 1"),
        ("model=qwen3_vl_8b model.max_pixels=0", "model.max_pixels=0 must be a whole number of at least 1, or null"),
    ],
)
def test_devices_and_workers_that_cannot_be_are_refused(given, said):
    with pytest.raises(ConfigError) as raised:
        load_config(given.split())
    assert said in str(raised.value)
