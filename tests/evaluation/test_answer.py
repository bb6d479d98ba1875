"""The Lightning module: it tests, it never trains, and its outcomes say what the model said."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer

from ivtp import load_model, load_pruner, prune, shape_of
from ivtp.core.loop import Kept
from ivtp.data.datamodule import Collate, QuestionData
from ivtp.data.scenes2 import Scenes2
from ivtp.evaluation.answering import Answer, kept_patches, normalise
from ivtp.evaluation.isolated import OutcomeWriter
from ivtp.pruners.planner import Planner

PROMPT = "<image> {question}"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture
def data(tiny):
    return QuestionData(Scenes2("test", 1), Collate(tiny[1], PROMPT), batch_size=4)


def trainer(**more):
    more |= {"logger": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, **more)


def answer(model, processor, **more):
    return Answer(model, processor, plan(model), generation={"max_new_tokens": 1}, **more)


def plan(model, name="ivtp", **settings):
    return load_pruner(name, shape_of(model), keep=16, **settings)


def test_fit_says_that_nothing_is_trained(tiny, data):
    module = answer(*tiny)
    with pytest.raises(RuntimeError, match=r"evaluates frozen models and trains nothing; use Trainer\.test"):
        trainer(max_epochs=1).fit(module, datamodule=data)
    with pytest.raises(RuntimeError, match="trains nothing"):
        trainer(max_epochs=1).fit(module, data.test_dataloader())


def test_no_weight_changes_and_none_belongs_to_the_module(tiny, data):
    model = tiny[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    module = answer(*tiny)
    trainer().test(module, datamodule=data, verbose=False)
    assert not list(module.parameters())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_outcome_is_what_generate_says_under_the_same_plan(tiny, data):
    model, processor = tiny
    outcomes = []
    trainer(callbacks=[OutcomeWriter(outcomes.extend)]).test(answer(*tiny), datamodule=data, verbose=False)
    samples = list(data.data)
    assert [outcome["id"] for outcome in outcomes] == [sample["id"] for sample in samples]
    for sample, outcome in zip(samples, outcomes, strict=True):
        text = PROMPT.replace("{question}", sample["question"])
        inputs = processor(images=sample["image"], text=text, return_tensors="pt")
        with prune(model, "ivtp", keep=16, instruction=sample["question"]) as run:
            ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert outcome["prediction"] == normalise(said)
        assert outcome["kept"] == run.trace.kept.position[0].tolist()
        assert outcome["answer"] == sample["answer"]
        assert outcome["image"] == sample["image_id"]


def test_batches_are_handed_over_as_they_are_done(tiny, data):
    sizes = []
    writer = OutcomeWriter(lambda new: sizes.append(len(new)))
    trainer(callbacks=[writer]).test(answer(*tiny), datamodule=data, verbose=False)
    assert sizes == [4, 4]


def test_the_logged_accuracy_is_that_of_the_outcomes(tiny, data):
    outcomes = []
    writer = OutcomeWriter(outcomes.extend)
    (logged,) = trainer(callbacks=[writer]).test(answer(*tiny), datamodule=data, verbose=False)
    assert logged["accuracy"] == pytest.approx(sum(o["correct"] for o in outcomes) / len(outcomes))


@pytest.mark.parametrize(
    ("text", "same"), [(" Yes.", "yes"), ("YES", "yes"), ("\ntwo .", "two"), ("3.5", "3.5"), ("no!", "no!"), ("", "")]
)
def test_answers_are_compared_without_case_space_and_full_stop(text, same):
    assert normalise(text) == same


def test_coverage_counts_valid_kept_tokens_on_what_was_asked():
    index = torch.tensor([[0, 2, 5], [1, 3, 0]])
    kept = Kept(layer=1, after="attn", position=index, valid=torch.tensor([[True, True, True], [True, True, False]]))
    asked = torch.zeros(6, dtype=torch.bool)
    asked[[2, 5]] = True
    assert kept_patches(kept, 0, asked) == {"kept": [0, 2, 5], "target_hit": True, "target_share": pytest.approx(2 / 3)}
    assert kept_patches(kept, 1, asked) == {"kept": [1, 3], "target_hit": False, "target_share": 0.0}
    assert kept_patches(kept, 1, torch.zeros(6, dtype=torch.bool)) == {
        "kept": [1, 3],
        "target_hit": None,
        "target_share": None,
    }
    assert kept_patches(None, 0, asked) == {"kept": None, "target_hit": None, "target_share": None}


def test_what_a_picture_lived_through_does_not_depend_on_its_neighbours_images(tiny):
    """In a batch with questions about two pictures and about none, the page must still show each its own tokens."""
    model, processor = tiny
    scenes = Scenes2("test", 3)
    one, two, other = (scenes[i] for i in (2, 10, 18))
    none = {**other, "id": "none", "images": []}
    nowhere = torch.zeros_like(two["patches"])
    both = {**two, "id": "both", "images": [two["image"], other["image"]], "patches": nowhere}
    collate = Collate(processor, PROMPT)
    found = {}
    for samples in ([none, one, both], [one]):
        planner = Planner("ivtp", shape_of(model), {"keep": 16})
        module = Answer(model, processor, planner, generation={"max_new_tokens": 1}, watch={one["id"]})
        found[len(samples)] = module.test_step(collate(samples), 0)["outcomes"]
    (_, together, _), (alone,) = found[3], found[1]
    assert together == alone
    assert set(alone["lived"]) == set("0123456"), "four cuts in the tower and two in the language model"
    assert len(alone["kept"]) == 16
    assert [len(outcome["kept"] or []) for outcome in found[3]] == [0, 16, 32]
