"""From samples to padded batches; what is done is not asked again."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ivtp import load_model
from ivtp.data.datamodule import Collate, QuestionData, WithoutImages
from ivtp.data.questions import DataError
from ivtp.data.scenes2 import Scenes2
from ivtp.experiment.planning import context_of

PROMPT = "<image> {question}"


@pytest.fixture(scope="module")
def processor():
    return load_model("tiny")[1]


def sample(name: str, question: str) -> dict:
    return {"id": name, "image": Image.new("RGB", (144, 144)), "question": question, "answer": "yes", "family": "exist"}


def test_prompts_of_unequal_length_are_padded_on_the_left(processor):
    batch = Collate(processor, PROMPT)([sample("1", "is there a red circle ?"), sample("2", "read the number")])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert mask[0].all()
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert not mask[1, 0]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert (ids == image).sum(1).tolist() == [324, 324]
    assert batch.inputs["pixel_values"].shape == (2, 3, 144, 144)
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


def test_a_batch_is_done_as_a_whole_and_what_is_left_keeps_its_order_and_its_batches(processor):
    """The last bits of an outcome depend on its batch: no batch may depend on what an earlier run has done."""
    data = QuestionData(Scenes2("test", 2), Collate(processor, PROMPT), batch_size=3)
    batches = [[s["id"] for s in batch.samples] for batch in data.test_dataloader()]
    everything = [name for batch in batches for name in batch]
    assert everything == [s["id"] for s in data.data] and list(map(len, batches)) == [3, 3, 3, 3, 3, 1]
    done = {*everything[:3], everything[4], *everything[9:]}
    data.left = data.missing(done)
    assert [[s["id"] for s in batch.samples] for batch in data.test_dataloader()] == batches[1:3]
    # Samples that failed are tried again in batches of their own, unless their batch is evaluated anyway.
    again = {everything[i] for i in (0, 2, 4, 9, 15)}
    data.left = data.missing(done, again)
    names = [[s["id"] for s in batch.samples] for batch in data.test_dataloader()]
    assert names == [*batches[1:3], [everything[i] for i in (0, 2, 9)], [everything[15]]]


def test_without_images_the_question_alone_is_asked(processor):
    class Few(list):
        def __init__(self, samples):
            super().__init__(samples)
            self.generation = {"max_new_tokens": 3}

        def scorer(self, given, text):
            return {"correct": text == "never"}

    patches = torch.ones(324, dtype=torch.bool)
    interleaved = sample("b", "<image> what is <image> ?") | {"images": [Image.new("RGB", (144, 144))] * 2}
    data = Few([sample("a", "read the number") | {"patches": patches}, interleaved | {"patches": patches}])
    blind = QuestionData(data, Collate(processor, PROMPT), batch_size=2).without_images()
    (batch,) = blind.test_dataloader()
    assert "pixel_values" not in batch.inputs and not batch.failed
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert not (batch.inputs["input_ids"] == image).any()
    assert [s["id"] for s in batch.samples] == ["a", "b"] and not any(s["patches"].any() for s in batch.samples)
    alone = processor.tokenizer(["read the number"])["input_ids"][0]
    assert batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()].tolist() == alone
    assert blind.scorer(data[0], "never") == {"correct": True} and blind.generation == {"max_new_tokens": 3}


def test_without_images_messages_keep_their_words():
    content = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": content},
    ]
    given = {"id": "a", "question": "what is this ?", "images": [1], "patches": torch.ones(4), "messages": messages}
    (bare,) = list(WithoutImages([given], "<image>"))
    assert [m["content"][-1]["text"] for m in bare["messages"]] == ["be brief", "what is this ?"]
    assert [len(m["content"]) for m in bare["messages"]] == [1, 1] and len(content) == 2


def test_a_limit_takes_the_first_samples_and_may_be_larger_than_the_data(processor):
    collate = Collate(processor, PROMPT)
    assert len(list(QuestionData(Scenes2("test", 2), collate, 3, limit=4).data)) == 4
    assert len(list(QuestionData(Scenes2("test", 2), collate, 3, limit=400).data)) == 16
    with pytest.raises(DataError, match=r"data\.limit=0 must be at least 1"):
        QuestionData(Scenes2("test", 2), collate, 3, limit=0)
    with pytest.raises(DataError, match=r"trainer\.batch_size=0 must be at least 1"):
        QuestionData(Scenes2("test", 2), collate, 0)


def test_sorted_batches_are_alike_and_leave_nothing_out(processor):
    """Long prompts beside short ones are padded; where images have several sizes, batches of one size need no groups."""
    ask = ["is there a red circle ?", "read the number", "is there a big red circle or a small blue square ?"]
    samples = [
        sample(str(i), ask[i % 3]) | {"image": Image.new("RGB", (144 + 24 * (i % 2), 144)), "patches": torch.zeros(324)}
        for i in range(11)
    ]
    for by_size in (False, True):
        data = QuestionData(samples, Collate(processor, PROMPT), 3, sort=True, by_size=by_size)
        batches = [batch.samples for batch in data.test_dataloader()]
        asked = [one for batch in batches for one in batch]
        assert sorted(int(one["id"]) for one in asked) == list(range(11))
        keys = [(by_size and one["image"].size, len(one["question"].split())) for one in asked]
        assert keys == sorted(keys, reverse=True)
        assert [one["id"] for one in data.in_data_order(asked)] == [one["id"] for one in samples]
        data.left = data.missing({one["id"] for one in asked[:4]})
        assert [one["id"] for batch in data.test_dataloader() for one in batch.samples] == [o["id"] for o in asked[3:]]


def several(name: str, images: int, question: str = "read the number") -> dict:
    return {**sample(name, question), "images": [Image.new("RGB", (144, 144))] * images}


def test_a_template_shows_as_many_images_as_the_sample_has(processor):
    """Two pictures need two places; a question about none must not have the place of one."""
    collate = Collate(processor, "USER: <image>\n{question} ASSISTANT:")
    assert collate.render(several("a", 1)) == "USER: <image>\nread the number ASSISTANT:"
    assert collate.render(several("a", 2)) == "USER: <image> <image>\nread the number ASSISTANT:"
    assert collate.render(several("a", 0)) == "USER: read the number ASSISTANT:"


def test_images_stand_where_the_question_has_them_if_it_has_a_place_for_each(processor):
    collate = Collate(processor, PROMPT)
    assert collate.render(several("a", 2, "is <image> like <image> ?")) == "is <image> like <image> ?"
    with pytest.raises(
        DataError, match="sample 'a': its question contains the image token '<image>' 1 times, but it has 2"
    ):
        collate.render(several("a", 2, "is <image> like it ?"))


def test_a_batch_of_none_one_and_two_images(processor):
    batch = Collate(processor, PROMPT)([several("a", 0), several("b", 2), several("c", 1)])
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert (batch.inputs["input_ids"] == image).sum(1).tolist() == [0, 648, 324]
    assert batch.inputs["pixel_values"].shape[0] == 3
    assert "pixel_values" not in Collate(processor, PROMPT)([several("a", 0)]).inputs


def test_chat_is_the_processor_s_own_template(processor):
    collate = Collate(processor, "chat")
    assert collate.render(several("a", 2, "what ?")) == "<image> <image> what ?"
    message = {
        "role": "user",
        "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "?"}],
    }
    assert collate.render({**several("a", 1), "messages": [message]}) == "one<image> ?"
    same = [Collate(processor, prompt)([sample("1", "read the number")]).inputs for prompt in (PROMPT, "chat")]
    assert torch.equal(same[0]["input_ids"], same[1]["input_ids"])


def test_a_template_that_writes_the_begin_mark_gets_no_second_one(processor, monkeypatch):
    mark = processor.tokenizer.bos_token
    monkeypatch.setattr(processor, "chat_template", mark + processor.chat_template)
    ids = Collate(processor, "chat")([sample("1", "read the number")]).inputs["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_chat_without_a_template_says_so(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", None)
    with pytest.raises(DataError, match=r"model\.prompt=chat, but this processor has no chat template"):
        Collate(processor, "chat")


# Samples that cannot be asked ------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_model_s_context_is_its_sample_s_own_error(processor):
    """Image tokens count; else it would end in "out of memory", or in an answer to positions nobody trained."""
    collate = Collate(processor, PROMPT, context=330)
    collate([sample("a", "read the number")])  # 324 + 4 + begin
    for question, said in (
        ("read the number " * 3, "338 tokens, images"),
        ("read the number " * 85, "343 tokens, before"),
    ):
        with pytest.raises(DataError, match=rf"sample 'b': its prompt has {said}.*, but the model's context is 330"):
            collate([sample("a", "read the number"), sample("b", question)])
    Collate(processor, PROMPT)([sample("b", "read the number " * 85)])


def test_a_megabyte_of_question_is_refused_before_it_is_padded(processor):
    """A batch would otherwise be padded to its length; a run knows it before the first batch."""
    collate = Collate(processor, PROMPT, context=1024)
    with pytest.raises(DataError, match=r"sample 'b': its prompt has 250003 tokens, before its images, but .* 1024"):
        collate.render(sample("b", "red " * 250_000))


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({}, 1009),
        ({"rope_type": "linear", "factor": 4.0}, 4036),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1009}, 4036),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 499}, 1009),
    ],
)
def test_the_context_is_the_one_that_rope_was_stretched_to(rope, context):
    """Configs state the length before the stretching or after it; a prompt that fits is never refused."""
    from transformers import LlamaConfig

    class Model:
        config = LlamaConfig(
            max_position_embeddings=1009, rope_parameters={"rope_theta": 1e4, **rope} if rope else None
        )

    assert context_of(Model) == context
    assert context_of(object()) is None


def test_the_context_of_a_vision_language_model_is_that_of_its_language_model():
    assert context_of(load_model("tiny")[0]) == 1024


def test_accepted_answers_are_part_of_what_a_result_depends_on(processor):
    known = sample("1", "read the number") | {"patches": torch.zeros(324)}
    data = [known, known | {"answers": ["yes", "no"]}, known | {"answers": ["yes"]}, known | {"answers": []}]
    hashes = [QuestionData([one], Collate(processor, PROMPT), 1).survey.hash for one in data]
    assert len(set(hashes)) == 4


def test_images_that_were_not_opened_have_their_places_in_the_prompt(processor):
    class Data(list):
        def sketch(self, place):
            return {**self[place], "sizes": [(9, 9)] * place}, b""

    data = QuestionData(
        Data({"id": str(i), "question": "what ?", "answer": "", "family": "all"} for i in range(3)),
        Collate(processor, PROMPT),
        1,
    )
    assert data.survey.prompts == ["what ?", "<image> what ?", "<image> <image> what ?"]
    assert data.survey.sizes == [[], [(9, 9)], [(9, 9)] * 2]
