"""`python -m ivtp.run model=…` over a checkpoint of every family with its chat template, and what it says of sizes."""

import json
from io import StringIO

import pytest
from helpers.families import FAMILIES, TEXTS, family, llava_next, photo
from helpers.running import by_label, one_line, outcomes, run
from rich.console import Console

import ivtp
from ivtp.backbones import ModelError
from ivtp.experiment.steps import say_crops

CONFIGS = {
    "llava": "llava_1_5_7b",
    "llava_next": "llava_next_7b",
    "llava_onevision": "llava_onevision_7b",
    "qwen2_5_vl": "qwen2_5_vl_7b",
    "qwen3_vl": "qwen3_vl_8b",
    "internvl": "internvl3_8b",
}
IM = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
VICUNA = """{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE
{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def saved(kind: str, folder):
    """A checkpoint as on the hub: weights, config, tokenizer, processor, chat template."""
    model, processor, image = family(kind)
    model.save_pretrained(folder)
    before = getattr(processor, "chat_template", None)
    processor.chat_template = (VICUNA if kind in ("llava", "llava_next") else IM).replace("IMAGE", image)
    processor.save_pretrained(folder)
    processor.chat_template = before
    return folder


def questions(folder):
    """Pictures of three sizes, as people have them."""
    folder.mkdir()
    rows = []
    for i, (height, width) in enumerate([(70, 56), (56, 84), (70, 70), (70, 56), (84, 42)]):
        photo(height, width, i).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "question": TEXTS[i % 3], "answer": "red"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_command_runs_every_family(kind, tmp_path, capsys):
    """The same command on what researchers use: chat template, pictures of any size, a batch of all of them."""
    text_encoder = [] if kind not in ("llava", "llava_next") else ["model.text_encoder=null"]
    image = [] if kind == "llava" else ["model.image=[84,70]" if kind.startswith("qwen") else "model.image=[70,70]"]
    code = run(
        f"model={CONFIGS[kind]}",
        f"model.source={saved(kind, tmp_path / 'model')}",
        "model.prompt=chat",
        *text_encoder,
        *image,
        "data=folder",
        f"data.path={questions(tmp_path / 'data')}",
        "data.max_new_tokens=2",
        "pruner=rollout",
        "budget.ratio=0.4",
        "logger=none",
        output=tmp_path / "out",
        quick=False,
    )
    assert code == 0, capsys.readouterr().err
    records = by_label(tmp_path / "out" / "run")
    assert set(records) == {"unpruned", "rollout"}
    for record in records.values():
        assert record["metrics"]["accuracy"]["n"] == 5
    if kind != "llava":
        metrics = records["rollout"]["metrics"]
        share = metrics["tokens_left"]["mean"] / metrics["visual_tokens"]["mean"]
        assert 0.25 < share < 0.5, "of every image's own tokens the share that was asked for stays"
        assert records["unpruned"]["metrics"]["tokens_left"] == records["unpruned"]["metrics"]["visual_tokens"]


def start(kind: str, folder, *more: str) -> tuple[int, dict]:
    """Exit status and records of a short run of a family."""
    arguments = [
        f"model={CONFIGS[kind]}",
        f"model.source={saved(kind, folder / 'model')}",
        "data=folder",
        "logger=none",
    ]
    if not (folder / "data").exists():
        questions(folder / "data")
    if kind != "llava":
        arguments.append("model.image=[70,70]")
    encoder = ["model.text_encoder=null"] if kind in ("llava", "llava_next") else ["model.prompt=chat"]
    arguments += [*encoder, f"data.path={folder / 'data'}", "data.max_new_tokens=2", "pruner=topk", "budget.ratio=0.4"]
    code = run(*arguments, *more, output=folder / "out", quick=False)
    return code, by_label(folder / "out" / "run") if code == 0 else {}


def test_padding_and_cropping_are_two_results(tmp_path, capfd):
    """One setting later, the answers of the other must not be taken for its own; table and page say which it is."""
    keys = set()
    for padding, words in (
        ("pad", "Images padded to a square."),
        ("crop", "Images cropped to a square at the centre."),
    ):
        code, records = start("llava", tmp_path, *([f"model.image_padding={padding}"] if padding == "crop" else []))
        assert code == 0 and {r["model"]["image_padding"] for r in records.values()} == {padding}
        keys |= {record["key"] for record in records.values()}
        assert words in (tmp_path / "out" / "run" / "table.md").read_text()
        assert words[1:-1] in (tmp_path / "out" / "run" / "report.html").read_text()
    assert len(keys) == 4
    capfd.readouterr()
    assert start("llava", tmp_path, "model.image_padding=square")[0] == 2
    assert "model.image_padding=square is not one of null, pad, crop" in one_line(capfd.readouterr().err)


def test_images_with_more_crops_than_the_limit_are_counted_before_the_run_and_recorded(tmp_path, capfd):
    """Of the five pictures those that the checkpoint cuts into 2 × 2 crops are made smaller at max_crops=2."""
    from transformers.image_processing_utils import select_best_resolution

    sizes = [(70, 56), (56, 84), (70, 70), (70, 56), (84, 42)]
    grids = family("llava_next")[0].config.image_grid_pinpoints
    more = sum(select_best_resolution(size, grids) == (70, 70) for size in sizes)
    assert 0 < more < len(sizes)
    code, records = start("llava_next", tmp_path, "model.max_crops=2")
    assert code == 0
    said = f"max_crops=2: images that the checkpoint cuts into more crops are made smaller; {more} of the 5 images"
    assert said in " ".join(capfd.readouterr().out.split())
    for record in records.values():
        assert (record["model"]["max_crops"], record["fewer_crops"]) == (2, more)
        assert record["metrics"]["visual_tokens"]["mean"] < 90
    assert (
        f"Images cut into at most 2 crops ({more} would have had more)."
        in (tmp_path / "out" / "run" / "table.md").read_text()
    )


def test_an_image_that_the_model_blends_fails_alone(tmp_path):
    """Without a limit of crops, a pruner of the tower cannot follow; the other samples and the unpruned row are as ever."""
    start("llava_onevision", tmp_path, "data.limit=1", "model.max_crops=null")  # writes the checkpoint
    for name in ("config.json", "processor_config.json"):
        text = (tmp_path / "model" / name).read_text()
        (tmp_path / "model" / name).write_text(text.replace("anyres_max_9", "anyres_max_2"))
    arguments = [
        "model=llava_onevision_7b",
        f"model.source={tmp_path / 'model'}",
        "model.max_crops=null",
        "model.prompt=chat",
    ]
    arguments += ["model.image=[70,70]", "data=folder", f"data.path={tmp_path / 'data'}", "data.max_new_tokens=2"]
    assert run(*arguments, "pruner=topk", "budget.ratio=0.4", "logger=none", output=tmp_path / "two", quick=False) == 0
    records = by_label(tmp_path / "two" / "run")
    assert records["unpruned"].get("failed") is None
    (cause,) = records["topk"]["failed"]["causes"].items()
    assert cause[0] == "cannot be answered" and 0 < cause[1] < 5
    failed = [outcome for outcome in outcomes(tmp_path / "two" / "run", records["topk"]) if "failed" in outcome]
    assert all("is interpolated behind the tower" in outcome["failed"] for outcome in failed)
    assert {outcome["id"] for outcome in failed} <= {"0", "2", "3"}  # 2 × 2 crops


def test_images_that_are_opened_later_are_counted_with_the_results():
    """Of benchmarks only the texts are read before a run."""
    model, processor, _ = llava_next()
    ivtp.load_model(model, processor, max_crops=2)
    console = Console(file=StringIO())
    say_crops(model, [None, None], console)
    assert "how many is recorded with the results" in " ".join(console.file.getvalue().split())


def test_measuring_images_of_many_sizes_is_refused_before_the_first(tmp_path, capfd):
    """One closed form cannot be beside the counts of every size; after hours of answers it would be late to say so."""
    found = run(
        f"model={CONFIGS['qwen3_vl']}",
        f"model.source={saved('qwen3_vl', tmp_path / 'model')}",
        "model.prompt=chat",
        "model.image=[84,70]",
        "data=folder",
        f"data.path={questions(tmp_path / 'data')}",
        "pruner=rollout",
        "measure=true",
        "logger=none",
        output=tmp_path / "out",
    )
    assert found == 2 and "measure=true counts one size of images" in one_line(capfd.readouterr().err)
    assert not (tmp_path / "out" / "run" / "outcomes").exists()


def test_a_budget_counts_an_image_or_each_crop():
    """LLaVA-NeXT's papers count either; five crops make a factor of five."""
    shape = ivtp.shape_of(family("llava_next")[0], (70, 70))
    assert (shape.crops, shape.patches, shape.separators) == (5, 25, 10)
    of_image = ivtp.load_pruner("fastv", shape, keep=20)
    of_crop = ivtp.load_pruner("fastv", shape, keep=20, per="crop")
    assert (of_image.final, of_crop.final) == (20, 100)
    tower = ivtp.load_pruner("topk", shape, keep=20)
    assert tower.vision.schedule[-1].keep == 4
    both = ivtp.load_pruner("ivtp", shape, keep=20, reference="last")
    assert both.language.schedule[-1].keep == 20
    assert both.language.schedule[0].keep <= 5 * both.vision.schedule[-1].keep
    for wrong, message in (({"keep": 3}, "at least one of each crop"), ({"keep": 9, "per": "row"}, "per='row'")):
        with pytest.raises(ValueError, match=message):
            ivtp.load_pruner("topk", shape, **wrong)


def test_what_a_family_cannot_do_is_said_in_one_line():
    """No silent change: M-RoPE has no renumbering, merge units no single patches, SigLIP no CLIP text."""
    qwen, onevision = family("qwen2_5_vl")[0], family("llava_onevision")[0]
    asked = (
        (qwen, "fastv", {"keep": 9, "position_ids": "renumber"}, "M-RoPE"),
        (qwen, "prumerge", {"keep": 9}, "patches of a unit"),
        (qwen, "downsample", {"keep": 9}, "own size"),
        (onevision, "ivtp", {"keep": 41}, "CLIP text encoder"),
    )
    for model, name, settings, message in asked:
        with pytest.raises(ValueError, match=message) as error, ivtp.prune(model, name, **settings):
            pass
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="multiples of 14"):
        ivtp.shape_of(qwen, (85, 70))
    with pytest.raises(ModelError, match="leave it out"):
        ivtp.shape_of(family("llava")[0], (70, 70))
