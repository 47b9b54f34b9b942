"""The figures of the comparison, from tables whose figures can be counted by eye."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hf2mnn.errors import EngineError
from hf2mnn.evaluate.answers import Answer, Outcome
from hf2mnn.evaluate.score import score, summarize
from hf2mnn.reference.golden import GoldenExample

POSITIONS = pd.DataFrame({"kld": [0.0, 0.3, 0.6], "same_top": [True, True, False]})
PICTURES = pd.DataFrame({"picture": ["small", "large"], "tokens": [1, 3], "cosine": [0.6, 1.0]})
ANSWERS = pd.DataFrame(
    {
        "expected": ["red", "two", None, "blue"],
        "reference": ["red", "two", "a cat", "green"],
        "answer": ["red", "three", "a dog", "blue"],
        "greedy_match": [True, False, False, False],
        "as_called": ["red", "two", "a cat", None],
    }
)


def test_each_figure_is_the_one_it_is_called() -> None:
    """Right answers are counted among labelled examples only, tokens weigh pictures, and PyTorch is what is matched."""
    assert summarize(POSITIONS, ANSWERS, PICTURES) == {
        "top1_agreement": pytest.approx(2 / 3),
        "mean_kld": pytest.approx(0.3),
        "greedy_match": pytest.approx(1 / 4),
        "task_accuracy": pytest.approx(2 / 3),
        "vision_cosine": pytest.approx(0.9),
        "as_called_match": pytest.approx(1.0),
        "as_called_accuracy": pytest.approx(1.0),
    }


def test_what_could_not_be_measured_is_none_and_not_a_good_figure() -> None:
    """No labels, no pictures, no engine: None, which no gate may take for 0 or for 1."""
    answers = ANSWERS.assign(expected=None, as_called=None)
    made = summarize(POSITIONS, answers, PICTURES.iloc[:0])
    missing = ("task_accuracy", "vision_cosine", "as_called_match", "as_called_accuracy")
    assert [made[name] for name in missing] == [None] * 4
    assert made["greedy_match"] == pytest.approx(1 / 4)


class FakeGolden:
    """Two examples of a three-token vocabulary, one with a picture."""

    def __init__(self) -> None:
        common = {"category": "any", "language": "en", "prompt": "", "input_ids": np.arange(2), "position_ids": None}
        logits = np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]], np.float32)
        ids = np.array([0, 1])
        self.list = [
            GoldenExample(
                id="a", expected="0 1", answer="0 1", pictures=["p"], answer_ids=ids, logits=logits, **common
            ),
            GoldenExample(id="b", expected=None, answer="0 1", pictures=[], answer_ids=ids, logits=logits, **common),
        ]

    def examples(self):
        return iter(self.list)

    def picture_names(self) -> list[str]:
        return ["p"]

    def picture(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(embeds=np.eye(2, dtype=np.float32))


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def outcome(greedy: list[int], embeds: np.ndarray) -> Outcome:
    logits = np.array([[5.0, 0.0, 0.0], [0.0, 0.0, 5.0]], np.float32)
    answers = {"a": Answer(FakeGolden().list[0].logits, [0, 1]), "b": Answer(logits, greedy)}
    return Outcome(answers, {"p": embeds})


def test_each_position_and_answer_is_compared_with_its_own() -> None:
    """The one wrong position is found where it is, and an answer is matched by all of its tokens."""
    scores = score(FakeGolden(), outcome([0, 2], np.eye(2, dtype=np.float32)), words)
    assert scores.positions[["id", "position", "after_picture", "same_top"]].to_numpy().tolist() == [
        ["a", 0, True, True],
        ["a", 1, True, True],
        ["b", 0, False, True],
        ["b", 1, False, False],
    ]
    assert scores.positions["kld"].tolist()[:3] == [0, 0, 0]
    assert scores.positions["kld"][3] > 1
    assert scores.answers["greedy_match"].tolist() == [True, False]
    assert scores.answers["right"].tolist() == [True, None]
    assert scores.summary["vision_cosine"] == pytest.approx(1)


def test_an_answer_that_goes_on_longer_is_no_match() -> None:
    scores = score(FakeGolden(), outcome([0, 1, 1], np.eye(2, dtype=np.float32)), words)
    assert scores.answers["greedy_match"].tolist() == [True, False]


def test_another_number_of_image_tokens_is_an_error_that_names_the_picture() -> None:
    """Broadcast silently, one row would be compared with all."""
    with pytest.raises(EngineError, match=r"\[1, 2\] for p, PyTorch gives \[2, 2\]"):
        score(FakeGolden(), outcome([0, 2], np.ones((1, 2), np.float32)), words)
