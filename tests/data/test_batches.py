"""From samples to padded batches; what is done is not asked again."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ivtp import load_model
from ivtp.data.batches import Collate, QuestionData
from ivtp.data.questions import DataError
from ivtp.data.scenes import Scenes

PROMPT = "<image> {question}"


@pytest.fixture(scope="module")
def processor():
    return load_model("tiny")[1]


def sample(name: str, question: str) -> dict:
    return {"id": name, "image": Image.new("RGB", (96, 96)), "question": question, "answer": "yes", "family": "exist"}


def test_prompts_of_unequal_length_are_padded_on_the_left(processor):
    batch = Collate(processor, PROMPT)([sample("1", "is there a red circle ?"), sample("2", "read the number")])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert mask[0].all()
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert not mask[1, 0]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert (ids == image).sum(1).tolist() == [144, 144]
    assert batch.inputs["pixel_values"].shape == (2, 3, 96, 96)
    alone = Collate(processor, PROMPT)([sample("2", "read the number")]).inputs["input_ids"]
    assert torch.equal(ids[1][mask[1].bool()], alone[0])


@pytest.mark.parametrize(
    "prompt", ["{question}", "<image> <image> {question}", "<image>", "<image> {question} {question}", ""]
)
def test_a_prompt_has_one_image_and_one_question(processor, prompt):
    with pytest.raises(DataError, match=r"must contain \{question\} once and <image> once"):
        Collate(processor, prompt)


def test_a_question_that_is_empty_or_brings_an_image_of_its_own_names_its_sample(processor):
    collate = Collate(processor, PROMPT)
    with pytest.raises(DataError, match="sample 'b' has an empty question"):
        collate([sample("a", "read the number"), sample("b", " \n")])
    with pytest.raises(DataError, match="sample 'b': its question contains the image token"):
        collate([sample("a", "read the number"), sample("b", "what is <image> ?")])


def test_braces_in_a_question_are_text(processor):
    Collate(processor, PROMPT)([sample("a", "what is {0} or {question} ?")])


def test_what_is_done_is_left_out_and_the_rest_keeps_its_order(processor):
    data = QuestionData(Scenes("test", 2), Collate(processor, PROMPT), batch_size=3)
    everything = [s["id"] for batch in data.test_dataloader() for s in batch.samples]
    assert everything == [s["id"] for s in data.samples()]
    assert len(everything) == 10
    data.done = {everything[0], everything[4]}
    left = [s["id"] for batch in data.test_dataloader() for s in batch.samples]
    assert left == [name for name in everything if name not in data.done]


def test_a_limit_takes_the_first_samples_and_may_be_larger_than_the_data(processor):
    collate = Collate(processor, PROMPT)
    assert len(list(QuestionData(Scenes("test", 2), collate, 3, limit=4).samples())) == 4
    assert len(list(QuestionData(Scenes("test", 2), collate, 3, limit=400).samples())) == 10
    with pytest.raises(DataError, match=r"data\.limit=0 must be at least 1"):
        QuestionData(Scenes("test", 2), collate, 3, limit=0)
    with pytest.raises(DataError, match=r"trainer\.batch_size=0 must be at least 1"):
        QuestionData(Scenes("test", 2), collate, 0)
