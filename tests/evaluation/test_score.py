"""Tables and figures of outputs that are small enough to count."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hf2mnn.core.errors import EngineError
from hf2mnn.evaluation.aggregate import COLUMNS
from hf2mnn.evaluation.findings import (
    ANSWERS,
    FIGURES,
    IMAGES,
    PARITY,
    POSITIONS,
    wrong_cache,
    wrong_rendering,
)
from hf2mnn.evaluation.score import (
    PARITY_COLUMNS,
    Answer,
    Outputs,
    Scores,
    parity_table,
    score,
    score_fault,
    summarize,
)
from hf2mnn.figures import EVALUATED, TABLE, shown_in
from hf2mnn.reference.cache_fill import SINGLE_CALL
from hf2mnn.reference.golden import GoldenExample

IMAGE = 9
RIGHT = np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]], np.float32)
WRONG = np.array([[5.0, 0.0, 0.0], [0.0, 0.0, 5.0]], np.float32)
EMBEDS = np.eye(2, dtype=np.float32)


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
        return SimpleNamespace(embeds=EMBEDS)


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def outputs(a: Answer | None = None, b: Answer | None = None, embeds: np.ndarray = EMBEDS) -> Outputs:
    """Return right outputs but for the arguments."""
    sound = Answer(RIGHT, [0, 1])
    return Outputs({"a": a or sound, "b": b or sound}, {"p": embeds})


def scored(**changed: Any) -> Scores:
    return score(FakeGolden(), outputs(**changed), words, IMAGE)


def column(scores: Scores, name: str) -> list[Any]:
    return [None if pd.isna(value) else value for value in scores.answers[name]]


def test_right_outputs_have_right_figures_and_none_where_nothing_is_measured() -> None:
    """None is neither 0 nor 1 to a gate: there is no plain call of an engine and no cache probe."""
    summary = scored().summary
    exact = ("top1_agreement", "top5_overlap", "perplexity_ratio", "greedy_match", "task_accuracy", "vision_cosine")
    assert {name: summary[name] for name in exact} == pytest.approx(dict.fromkeys(exact, 1.0))
    none = ("mean_kld", "p99_kld", "max_kld", "rms_probability_change", "degenerate", "vision_error")
    assert {name: summary[name] for name in none} == dict.fromkeys(none, 0.0)
    missing = ("as_called_match", "as_called_accuracy", "tokenizer_match", "template_match", "cache_parity")
    assert {name: summary[name] for name in missing} == dict.fromkeys(missing)
    columns = [column for figure in shown_in(TABLE) if figure.source in EVALUATED for column in figure.columns]
    assert list(summary) == columns


def test_each_position_is_compared_with_the_same_position() -> None:
    """Only the wrong position differs; its token loses 5 nats."""
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
def test_an_answer_matches_only_with_all_of_its_tokens_and_no_more(
    greedy: list[int], match: bool, shared: float
) -> None:
    scores = scored(b=Answer(RIGHT, greedy))
    assert column(scores, "greedy_match") == [True, match]
    assert column(scores, "prefix_share") == [1, shared]
    assert column(scores, "prefix_tokens") == [2, 2 * shared]
    assert column(scores, "answer") == ["0 1", words(greedy)]


def test_scores_count_labelled_examples_only() -> None:
    wrong = scored(a=Answer(RIGHT, [2], as_called_ids=[0, 1]), b=Answer(RIGHT, [2], as_called_ids=[2]))
    assert column(wrong, "expected") == ["0 1", None]
    assert column(wrong, "score") == [0, None]
    assert column(wrong, "reference_score") == [1, None]
    assert column(wrong, "as_called_score") == [1, None]
    assert column(wrong, "as_called_match") == [True, False]
    assert wrong.summary["task_accuracy"] == 0
    assert (wrong.summary["as_called_accuracy"], wrong.summary["as_called_match"]) == (1, 0.5)


def test_a_loop_is_degenerate_only_if_pytorch_has_none() -> None:
    """A small model repeats itself, and so must its conversion."""
    loop, golden = Answer(RIGHT, [1] * 20), FakeGolden()
    assert column(scored(b=loop), "degenerate") == [False, True]
    assert column(scored(b=loop), "repetition")[1] > 0.9
    longer = np.concatenate([RIGHT] * 10)
    golden.list[1] = replace(golden.list[1], answer_ids=np.array([1] * 20), logits=longer)
    scores = score(golden, outputs(b=Answer(longer, [1] * 20)), words, IMAGE)
    assert column(scores, "degenerate") == [False, False]


@pytest.mark.parametrize(
    ("ids", "same"),
    [
        ([4, IMAGE, IMAGE, 5], True),
        ([4, *[IMAGE] * 7, 5], True),  # the engine's own resizing gives another number of image tokens
        ([4, 5], False),
        ([4, IMAGE, 5, 5], False),
        ([4, IMAGE, 5, IMAGE], False),
    ],
)
def test_prompt_tokens_are_compared_but_for_the_number_of_image_tokens(ids: list[int], same: bool) -> None:
    scores = scored(a=Answer(RIGHT, [0, 1], [0, 1], ids))
    assert column(scores, "tokenizer_match") == [same, None]
    assert scores.summary["tokenizer_match"] == same


def test_a_repeated_text_token_counts_twice() -> None:
    golden = FakeGolden()
    golden.list[1] = replace(golden.list[1], input_ids=np.array([4, 4, 5]))
    scores = score(golden, outputs(b=Answer(RIGHT, [0, 1], [0, 1], [4, 5])), words, IMAGE)
    assert column(scores, "tokenizer_match") == [None, False]


def test_a_prompt_that_the_engine_renders_differently_is_reported() -> None:
    """The message shows the first difference, the engine's text first."""
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
    (finding,) = wrong_rendering(scores.answers)
    assert (finding.part, finding.point) == ("template", None)
    assert finding.message.startswith("the engine renders 2 of 2 conversations to another prompt: first in a, '<user>W")
    assert wrong_rendering(scored(a=right).answers) == wrong_rendering(scored().answers) == []


def test_an_image_is_compared_token_by_token() -> None:
    """One of two tokens is right, the other is orthogonal and twice as long: |(0, 0), (-2, -1)| over sqrt(2)."""
    (row,) = scored(embeds=np.array([[1, 0], [2, 0]], np.float32)).images.to_dict("records")
    expected = {"image": "p", "tokens": 2, "cosine": 0.5, "worst_cosine": 0.0, "error": np.sqrt(5 / 2)}
    assert row == pytest.approx(expected)


def test_another_number_of_image_tokens_is_an_error_that_names_the_image() -> None:
    """Broadcasting would compare one row with all."""
    with pytest.raises(EngineError, match=r"\[1, 2\] for p, PyTorch gives \[2, 2\]"):
        scored(embeds=np.ones((1, 2), np.float32))


def test_cache_parity_is_the_worst_of_all_ways() -> None:
    ways = {SINGLE_CALL: RIGHT, "token by token": RIGHT, "in chunks": WRONG}
    scores = score(FakeGolden(), replace(outputs(), parity={"text": ways}), words, IMAGE)
    assert scores.summary["cache_parity"] == scores.parity["max_kld"].max() > 1
    assert summarize(scores.figures, parity_table({}))["cache_parity"] is None


def test_each_table_has_a_file() -> None:
    scores = scored()
    assert scores.tables() == {
        POSITIONS: scores.positions,
        ANSWERS: scores.answers,
        IMAGES: scores.images,
        PARITY: scores.parity,
        FIGURES: scores.figures,
    }


def test_a_bundle_that_does_not_run_has_the_same_tables_without_figures(tmp_path) -> None:
    """Figures of empty answers would mislead: 0 repetitions are good."""
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


def test_parity_of_two_positions_with_swapped_logits() -> None:
    """Compare with KL divergence and top-1 agreement computed on paper."""
    right = np.log(np.array([[1, 1, 2], [4, 2, 2]], np.float32))
    other = np.log(np.array([[1, 1, 2], [2, 4, 2]], np.float32))
    table = parity_table({"text": {SINGLE_CALL: right, "in chunks": other}})
    ((probe, way, positions, kld, change, same),) = table.to_numpy()
    assert (probe, way, positions, same) == ("text", "in chunks", 2, 0.5)
    assert kld == pytest.approx((4 * np.log(2) - 2 * np.log(2)) / 8)
    assert change == pytest.approx(np.log(2) / right.std())


def test_parity_without_probes_is_an_empty_table() -> None:
    table = parity_table({})
    assert list(table.columns) == PARITY_COLUMNS
    assert wrong_cache(table) == []
