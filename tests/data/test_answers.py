"""How an answer is scored: what matches, and what several accepted answers are worth."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from ivtp.data.answers import CREDITS, MATCHES, Scorer, exact
from ivtp.registry import UnknownName

TEN = ["yes", "yes", "yes", "no", "Yes.", "yeah", "the yes", "no", "2", "two"]


def correct(text: str, *accepted: str, **settings) -> bool | float | None:
    return Scorer(**settings)({"answer": accepted[0], "answers": list(accepted)}, text)["correct"]


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        (" Yes.", "yes", ("exact", "vqa", "contains")),
        ("a square", "square", ("vqa", "contains")),
        ("two", "2", ("vqa",)),
        ("It is a square, I think.", "square", ("contains",)),
        ("It is a squarer one", "square", ()),
        ("not that I know", "no", ()),
        ("it costs 3.50", "3.5", ()),
        ("it says c++ there", "c++", ("contains",)),
        ("well, yes", "yes", ("contains",)),
        ("dont", "don't", ("vqa",)),
        ("", ".", ("exact", "contains", "vqa")),
        ("anything", ".", ()),
    ],
)
def test_what_matches_an_accepted_answer(text, accepted, right):
    assert tuple(match for match in MATCHES if correct(text, accepted, match=match)) == tuple(
        match for match in MATCHES if match in right
    )


def test_vqa_scores_are_those_of_lmms_eval_to_the_bit():
    """Normalisation and accuracy of VQAv2 as its official evaluation works them out."""
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    scorer = Scorer("vqa", "vqa")
    asked = [
        TEN,
        ["a cat"] * 10,
        ["cat", "cats", "kitten", "dog"],
        ["", "", "n/a", "unanswerable"],
        ["1,000", "1000"] * 5,
    ]
    texts = ["yes", "Yes.", "no", "two", "The cat", "cat!", "kitten", "", "1,000", "dog\n", "dont", "none", "0", "n/a"]
    values = set()
    for accepted in asked:
        for text in texts:
            doc = {"question_id": 1, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(accepted)]}
            official = vqav2_process_results_val(copy.deepcopy(doc), [text])["exact_match"]
            found = scorer({"answer": "", "answers": accepted}, text)["correct"]
            assert found == official and isinstance(found, bool) == (official in (0, 1))
            values.add(found)
    assert len(values) > 4, "whole, none and partial credit"


def test_partial_credit_counts_the_other_annotators():
    """Each of three who said so sees two others: (3 · 2/3 + 7 · 1) / 10."""
    assert correct("red", *["red"] * 3, *["blue"] * 7, answers="vqa") == pytest.approx(0.9)
    assert correct("red", *["red"] * 1, *["blue"] * 9, answers="vqa") == pytest.approx(0.3)
    assert correct("red", *["red"] * 4, *["blue"] * 6, answers="vqa") is True
    assert correct("green", *["red"] * 4, *["blue"] * 6, answers="vqa") is False
    assert correct("red", *["red"] * 1, *["blue"] * 9, answers="any") is True


@pytest.mark.parametrize("credit", CREDITS)
def test_without_an_accepted_answer_nothing_is_right_or_wrong(credit):
    outcome = Scorer(answers=credit)({"answer": "", "answers": []}, " Red.")
    assert outcome == {"answer": "", "prediction": "red", "correct": None}


def test_one_answer_is_scored_as_ever():
    """The outcomes of scenes must not change."""
    assert exact({"answer": "Yes"}, " yes.\n") == {"answer": "yes", "prediction": "yes", "correct": True}
    assert exact({"answer": "a square"}, "square") == {"answer": "a square", "prediction": "square", "correct": False}


def test_several_answers_are_shown_once_each():
    assert Scorer()({"answer": "", "answers": ["Red.", "red", "blue"]}, "x")["answer"] == "red | blue"


@pytest.mark.parametrize(("settings", "key"), [({"match": "fuzzy"}, "match"), ({"answers": "all"}, "answers")])
def test_a_rule_that_there_is_none_of(settings, key):
    with pytest.raises(UnknownName, match=rf"value of data\.{key}"):
        Scorer(**settings)


def test_without_lmms_eval_vqa_says_what_to_install():
    """It is an optional part; nobody else may need it."""
    code = (
        "import sys; sys.modules['lmms_eval'] = None; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'lmms_eval' else find(name, *a)\n"
        "from ivtp.data.answers import Scorer; Scorer()\n"
        "try: Scorer('vqa')\nexcept Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == ('UserError data.match=vqa takes its normalisation from lmms-eval; pip install "ivtp[lmms]"')
