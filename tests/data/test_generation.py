"""What a task asks of `generate` reaches it, and answers end where it says."""

from __future__ import annotations

import pytest

from ivtp.data.questions import DataError
from ivtp.lmms.generation import generation_settings, stop_texts, truncate


def test_settings_that_have_a_meaning_without_sampling_are_passed_on():
    asked = {
        "max_new_tokens": 16,
        "num_beams": 3,
        "temperature": 0,
        "top_p": None,
        "until": ["x"],
        "image_aspect_ratio": "a",
    }
    assert generation_settings(asked) == {"max_new_tokens": 16, "num_beams": 3}
    assert generation_settings({}) == {"max_new_tokens": 1024}


@pytest.mark.parametrize("asked", [{"do_sample": True}, {"temperature": 0.7}, {"do_sample": True, "temperature": 0}])
def test_a_task_that_samples_is_refused(asked):
    """Its answers would depend on the batch: two rows would differ for no reason of theirs."""
    with pytest.raises(DataError, match=r"samples its answers .*do_sample"):
        generation_settings(asked)


def test_a_temperature_without_sampling_means_nothing():
    assert generation_settings({"do_sample": False, "temperature": 0.2, "max_new_tokens": 5}) == {"max_new_tokens": 5}


@pytest.mark.parametrize(
    ("until", "text", "left"),
    [
        (["ASSISTANT:"], "yes ASSISTANT: no", "yes "),
        ("\n", "yes\nno", "yes"),
        (["\n\n"], "first\n\nsecond", "first\n\nsecond"),
        (["b", "a"], "xaybz", "x"),
        (None, "all of it", "all of it"),
    ],
)
def test_an_answer_ends_at_the_first_text_that_ends_it(until, text, left):
    assert truncate(text, stop_texts({"until": until})) == left
