"""The tables and figures of the comparison, from outcomes whose figures can be counted by eye."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hf2mnn.core.errors import EngineError
from hf2mnn.evaluation.answers import Answer, Outcome
from hf2mnn.evaluation.figures import COLUMNS
from hf2mnn.evaluation.findings import misread_template
from hf2mnn.evaluation.names import ANSWERS, COMPARED, FIGURES, IMAGES, PARITY, POSITIONS
from hf2mnn.evaluation.parity import parity_table
from hf2mnn.evaluation.score import Scores, score, score_fault, summarize
from hf2mnn.reference.cache_fill import AT_ONCE
from hf2mnn.reference.golden import GoldenExample

IMAGE = 9
RIGHT = np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]], np.float32)
WRONG = np.array([[5.0, 0.0, 0.0], [0.0, 0.0, 5.0]], np.float32)
SEEN = np.eye(2, dtype=np.float32)


class FakeGolden:
    """Two examples of a three-token vocabulary; "a" has a label and an image of two image tokens, "b" has neither."""

    def __init__(self) -> None:
        common: dict[str, Any] = {"category": "any", "language": "en", "metric": "exact", "answer": "0 1"}
        common |= {"messages": [{"role": "user", "content": "Which?"}], "prompt": "<user>Which?</user>"}
        common |= {"position_ids": np.zeros((3, 5)), "answer_ids": np.array([0, 1]), "logits": RIGHT}
        imaged, plain = np.array([4, IMAGE, IMAGE, 5]), np.array([4, 5])
        self.list = [
            GoldenExample(id="a", expected=["0 1"], images=["p"], input_ids=imaged, **common),
            GoldenExample(id="b", expected=None, images=[], input_ids=plain, **common),
        ]

    def examples(self):
        return iter(self.list)

    def image_names(self) -> list[str]:
        return ["p"]

    def image(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(embeds=SEEN)


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def outcome(a: Answer | None = None, b: Answer | None = None, embeds: np.ndarray = SEEN) -> Outcome:
    """What a runtime would say; right but for what is given."""
    sound = Answer(RIGHT, [0, 1])
    return Outcome({"a": a or sound, "b": b or sound}, {"p": embeds})


def scored(**changed: Any) -> Scores:
    return score(FakeGolden(), outcome(**changed), words, IMAGE)


def column(scores: Scores, name: str) -> list[Any]:
    return [None if pd.isna(value) else value for value in scores.answers[name]]


def test_a_right_outcome_has_right_figures_and_what_was_not_measured_has_none() -> None:
    """None, which no gate may take for 0 or for 1: no engine was asked as it is, no cache was filled."""
    summary = scored().summary
    exact = ("top1_agreement", "top5_overlap", "perplexity_ratio", "greedy_match", "task_accuracy", "vision_cosine")
    assert {name: summary[name] for name in exact} == pytest.approx(dict.fromkeys(exact, 1.0))
    none = ("mean_kld", "p99_kld", "max_kld", "rms_probability_change", "degenerate", "vision_error")
    assert {name: summary[name] for name in none} == dict.fromkeys(none, 0.0)
    missing = ("as_called_match", "as_called_accuracy", "tokenizer_match", "template_match", "cache_parity")
    assert {name: summary[name] for name in missing} == dict.fromkeys(missing)
    assert summary.keys() == {*COMPARED, "mean_kld_low", "mean_kld_high", "cache_parity"}


def test_each_position_is_compared_with_its_own() -> None:
    """The one wrong position is found where it is, and its right token has lost the odds of 5 nats."""
    scores = scored(b=Answer(WRONG, [0, 2]))
    assert scores.positions[["id", "position", "after_image", "same_top"]].to_numpy().tolist() == [
        ["a", 0, True, True],
        ["a", 1, True, True],
        ["b", 0, False, True],
        ["b", 1, False, False],
    ]
    assert scores.positions["kld"].tolist()[:3] == [0, 0, 0]
    lost = scores.positions["reference_logprob"] - scores.positions["logprob"]
    assert lost.tolist() == pytest.approx([0, 0, 0, 5])
    assert scores.summary["top1_agreement"] == 3 / 4
    assert scores.summary["perplexity_ratio"] == pytest.approx(np.exp(5 / 4))
    assert scores.summary["max_kld"] == pytest.approx(4 * scores.summary["mean_kld"]) == scores.positions["kld"][3]
    assert scores.summary["mean_kld_low"] == 0
    assert scores.summary["mean_kld_high"] > scores.summary["mean_kld"]


@pytest.mark.parametrize(
    ("greedy", "match", "shared"), [([0, 1], True, 1), ([0, 2], False, 0.5), ([2], False, 0), ([0, 1, 1], False, 1)]
)
def test_an_answer_is_matched_by_all_of_its_tokens_and_no_more(greedy: list[int], match: bool, shared: float) -> None:
    scores = scored(b=Answer(RIGHT, greedy))
    assert column(scores, "greedy_match") == [True, match]
    assert column(scores, "prefix_share") == [1, shared]
    assert column(scores, "prefix_tokens") == [2, 2 * shared]
    assert column(scores, "answer") == ["0 1", words(greedy)]


def test_right_answers_are_counted_among_labelled_examples_only() -> None:
    wrong = scored(a=Answer(RIGHT, [2], as_called_ids=[0, 1]), b=Answer(RIGHT, [2], as_called_ids=[2]))
    assert column(wrong, "expected") == ["0 1", None]
    assert column(wrong, "score") == [0, None]
    assert column(wrong, "reference_score") == [1, None]
    assert column(wrong, "as_called_score") == [1, None]
    assert column(wrong, "as_called_match") == [True, False]
    assert wrong.summary["task_accuracy"] == 0
    assert (wrong.summary["as_called_accuracy"], wrong.summary["as_called_match"]) == (1, 0.5)


def test_a_loop_is_held_against_a_conversion_only_where_pytorch_has_none() -> None:
    """A small model repeats itself; that a conversion does so too is right."""
    loop, golden = Answer(RIGHT, [1] * 20), FakeGolden()
    assert column(scored(b=loop), "degenerate") == [False, True]
    assert column(scored(b=loop), "repetition")[1] > 0.9
    longer = np.concatenate([RIGHT] * 10)
    golden.list[1] = replace(golden.list[1], answer_ids=np.array([1] * 20), logits=longer)
    scores = score(golden, outcome(b=Answer(longer, [1] * 20)), words, IMAGE)
    assert column(scores, "degenerate") == [False, False]


@pytest.mark.parametrize(
    ("made", "same"),
    [
        ([4, IMAGE, IMAGE, 5], True),
        ([4, *[IMAGE] * 7, 5], True),  # the engine resizes by itself: not the tokenizer's doing
        ([4, 5], False),
        ([4, IMAGE, 5, 5], False),
        ([4, IMAGE, 5, IMAGE], False),
    ],
)
def test_a_prompts_tokens_are_compared_but_for_how_many_a_image_makes(made: list[int], same: bool) -> None:
    scores = scored(a=Answer(RIGHT, [0, 1], [0, 1], made))
    assert column(scores, "tokenizer_match") == [same, None]
    assert scores.summary["tokenizer_match"] == same


def test_a_text_token_that_comes_twice_counts_twice() -> None:
    golden = FakeGolden()
    golden.list[1] = replace(golden.list[1], input_ids=np.array([4, 4, 5]))
    scores = score(golden, outcome(b=Answer(RIGHT, [0, 1], [0, 1], [4, 5])), words, IMAGE)
    assert column(scores, "tokenizer_match") == [None, False]


def test_the_engines_own_prompt_is_the_templates_or_is_told() -> None:
    """With the place where they part, and who of the two has what."""
    right = Answer(RIGHT, [0, 1], [0, 1], [4, 5], "<user>Which?</user>")
    other = Answer(RIGHT, [0, 1], [0, 1], [4, 5], "<user>Which?")
    none = Answer(RIGHT, [0, 1], [], [4, 5], "")
    assert column(scored(a=right), "template_match") == [True, None]
    assert column(scored(a=right), "template_difference") == [None, None]
    scores = scored(a=other, b=none)
    assert column(scores, "template_match") == [False, False] and scores.summary["template_match"] == 0
    assert column(scores, "template_difference") == [
        "'<user>Which?' for '<user>Which?</user>'",
        "'' for '<user>Which?</user>'",
    ]
    (finding,) = misread_template(scores.answers)
    assert (finding.part, finding.point) == ("template", None)
    assert finding.sentence.startswith("the engine makes another prompt of 2 of 2 conversations: first in a, '<user>W")
    assert misread_template(scored(a=right).answers) == misread_template(scored().answers) == []


def test_a_image_is_compared_token_by_token() -> None:
    """One of two tokens is right, the other at a right angle and twice as long: |(0, 0), (-2, -1)| of sqrt(2)."""
    (row,) = scored(embeds=np.array([[1, 0], [2, 0]], np.float32)).images.to_dict("records")
    expected = {"image": "p", "tokens": 2, "cosine": 0.5, "worst_cosine": 0.0, "error": np.sqrt(5 / 2)}
    assert row == pytest.approx(expected)


def test_another_number_of_image_tokens_is_an_error_that_names_the_image() -> None:
    """Broadcast silently, one row would be compared with all."""
    with pytest.raises(EngineError, match=r"\[1, 2\] for p, PyTorch gives \[2, 2\]"):
        scored(embeds=np.ones((1, 2), np.float32))


def test_cache_parity_is_the_worst_of_all_ways() -> None:
    ways = {AT_ONCE: RIGHT, "token by token": RIGHT, "in chunks": WRONG}
    made = replace(outcome(), parity={"text": ways})
    scores = score(FakeGolden(), made, words, IMAGE)
    assert scores.summary["cache_parity"] == scores.parity["max_kld"].max() > 1
    assert summarize(scores.figures, parity_table({}))["cache_parity"] is None


def test_every_table_has_its_file() -> None:
    scores = scored()
    assert scores.tables() == {
        POSITIONS: scores.positions,
        ANSWERS: scores.answers,
        IMAGES: scores.images,
        PARITY: scores.parity,
        FIGURES: scores.figures,
    }


def test_a_bundle_that_does_not_run_has_the_same_tables_and_nothing_measured(tmp_path) -> None:
    """No figure at all, rather than those of empty answers: a share of 0 repetitions would be a good one."""
    sound, fault = scored(), score_fault(FakeGolden(), words, IMAGE)
    assert fault.summary == dict.fromkeys(sound.summary)
    for name, table in fault.tables().items():
        assert list(table.columns) == list(sound.tables()[name].columns), name
        table.to_parquet(tmp_path / name)
    assert list(fault.figures.columns) == COLUMNS
    assert fault.answers["id"].tolist() == ["a", "b"]
    assert fault.answers["answer"].tolist() == ["", ""]
    assert not fault.answers["greedy_match"].any()
    assert len(fault.positions) == len(fault.figures) == len(fault.parity) == 0
