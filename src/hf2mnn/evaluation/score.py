"""Outputs of a runtime on the evaluation set, and the tables and figures made of them.

Tables: positions, answers, images, KV-cache parity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from hf2mnn import metrics
from hf2mnn.core.errors import EngineError
from hf2mnn.evaluation.aggregate import COLUMNS as FIGURE_COLUMNS
from hf2mnn.evaluation.aggregate import aggregate
from hf2mnn.evaluation.findings import ANSWERS, FIGURES, IMAGES, PARITY, POSITIONS
from hf2mnn.figures import EVALUATED, TABLE, shown_in
from hf2mnn.reference.cache_fill import SINGLE_CALL
from hf2mnn.reference.golden import Golden, GoldenExample, collapse_repeats
from hf2mnn.reference.prompts import AnswerDecoder
from hf2mnn.reference.tasks import score_answer

POSITION_COLUMNS = ["id", "position", "after_image", "kld", "same_top", "top5_overlap", "reference_logprob", "logprob"]
IMAGE_COLUMNS = ["image", "tokens", "cosine", "worst_cosine", "error"]
PARITY_COLUMNS = ["probe", "way", "positions", "max_kld", "max_logit_change", "same_top"]
ENGINE_COLUMNS = ("as_called", "as_called_match", "tokenizer_match", "template_match", "template_difference")
SCORE_COLUMNS = ("reference_score", "score", "as_called_score")
CONTEXT = 20
"""Characters shown before and after the first difference of two prompts."""


@dataclass(frozen=True)
class Answer:
    """Outputs for one example; the last three are of MNN's engine, and None for other runtimes."""

    logits: np.ndarray  # float32 [m, vocabulary], teacher-forced: row i follows prompt and i tokens of PyTorch's answer
    greedy_ids: list[int]  # greedy answer, decoded with the runtime's KV cache, with the stop token
    as_called_ids: list[int] | None = None  # answer of a plain call
    prompt_ids: list[int] | None = None  # token ids of the reference prompt by the engine's tokenizer
    rendered_prompt: str | None = None  # prompt that the engine renders from the conversation


@dataclass
class Outputs:
    """Outputs for the evaluation set."""

    answers: dict[str, Answer] = field(default_factory=dict)  # by example id
    embeds: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [image tokens, hidden] by image
    # Logits, float32 [tokens, vocabulary], by probe and way of filling the KV cache.
    parity: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Results of an evaluation."""

    positions: pd.DataFrame  # one row for each teacher-forced position
    answers: pd.DataFrame  # one row for each example
    images: pd.DataFrame  # one row for each image
    parity: pd.DataFrame  # one row for each probe and way of filling the KV cache
    figures: pd.DataFrame  # by group, with intervals (`hf2mnn.evaluation.aggregate`)

    @property
    def summary(self) -> dict[str, float | None]:
        """Figures of the whole set; None where there was nothing to measure."""
        return summarize(self.figures, self.parity)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables by the name of their file."""
        tables = {POSITIONS: self.positions, ANSWERS: self.answers, IMAGES: self.images}
        return tables | {PARITY: self.parity, FIGURES: self.figures}


def _position_rows(example: GoldenExample, logits: np.ndarray) -> list[tuple]:
    columns = (
        metrics.kl_divergence(example.logits, logits),
        metrics.same_top(example.logits, logits),
        metrics.top_overlap(example.logits, logits),
        metrics.token_logprobs(example.logits, example.answer_ids),
        metrics.token_logprobs(logits, example.answer_ids),
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(example.id, index, bool(example.images), *row) for index, row in enumerate(rows)]


def first_difference(text: str, expected: str) -> str | None:
    """Describe the first difference of two texts; None where they are equal."""
    if text == expected:
        return None
    start = metrics.common_prefix(text, expected)
    given, wanted = (part[max(0, start - CONTEXT) : start + CONTEXT] for part in (text, expected))
    return f"{given!r} for {wanted!r}"


def _answer_row(example: GoldenExample, answer: Answer, decode: AnswerDecoder, image: int | None) -> dict[str, Any]:
    """Return a row of the table of answers.

    Scores are None for an example without a label; columns of the engine are None for other runtimes.
    """
    text, reference_ids = decode(answer.greedy_ids), example.answer_ids.tolist()
    prefix = metrics.common_prefix(answer.greedy_ids, reference_ids)
    row = {
        "id": example.id,
        "category": example.category,
        "language": example.language,
        "images": len(example.images),
        "expected": None if example.expected is None else " / ".join(example.expected),
        "reference": example.answer,
        "answer": text,
        "greedy_match": answer.greedy_ids == reference_ids,
        "prefix_tokens": prefix,
        "prefix_share": prefix / len(reference_ids),
        "repetition": metrics.repetition(answer.greedy_ids),
        # A loop that PyTorch has too is the model's, not the conversion's.
        "degenerate": metrics.ends_in_a_loop(answer.greedy_ids) and not metrics.ends_in_a_loop(reference_ids),
        **dict.fromkeys(ENGINE_COLUMNS + SCORE_COLUMNS),
    }
    if answer.as_called_ids is not None:
        row["as_called"] = decode(answer.as_called_ids)
        row["as_called_match"] = row["as_called"] == example.answer
    if answer.prompt_ids is not None:
        ids, expected = (collapse_repeats(np.array(ids), image) for ids in (answer.prompt_ids, example.input_ids))
        row["tokenizer_match"] = np.array_equal(ids, expected)
    if answer.rendered_prompt is not None:
        row["template_difference"] = first_difference(answer.rendered_prompt, example.prompt)
        row["template_match"] = row["template_difference"] is None
    if example.expected is not None:
        for column, given in zip(SCORE_COLUMNS, (example.answer, text, row["as_called"]), strict=True):
            row[column] = None if given is None else score_answer(example.metric, given, example.expected)
    return row


def _image_rows(golden: Golden, embeds: dict[str, np.ndarray]) -> list[tuple]:
    rows = []
    for name in golden.image_names():
        reference, embedded = golden.image(name).embeds, embeds[name]
        if reference.shape != embedded.shape:
            raise EngineError(
                f"the vision tower gives {list(embedded.shape)} for {name}, PyTorch gives {list(reference.shape)}"
            )
        cosines, error = metrics.cosine(reference, embedded), metrics.relative_error(reference, embedded)
        rows.append((name, len(cosines), float(cosines.mean()), float(cosines.min()), error))
    return rows


def parity_table(logits: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """Compare the logits of each way of filling the KV cache with those of a single call.

    A wrong parity shows an attention that is not fused, wrong positions, or a cache that is not truncated. Returns a
    table with PARITY_COLUMNS; `max_logit_change` is in standard deviations of the probe's logits.
    """
    rows = []
    for probe, ways in sorted(logits.items()):
        single = ways[SINGLE_CALL]
        for way, other in ways.items():
            if way != SINGLE_CALL:
                divergence, same = metrics.kl_divergence(single, other).max(), metrics.same_top(single, other).mean()
                change = float(np.abs(other - single).max() / single.std())
                rows.append((probe, way, len(single), float(divergence), change, float(same)))
    return pd.DataFrame(rows, columns=PARITY_COLUMNS)


def summarize(figures: pd.DataFrame, parity: pd.DataFrame) -> dict[str, float | None]:
    """Return the evaluated figures of the table over the whole set; None for those that were not measured."""
    whole = figures[figures["group"] == "all"].set_index("figure")
    summary: dict[str, float | None] = {}
    for figure in shown_in(TABLE):
        if figure.source in EVALUATED:
            known = figure.name in whole.index
            values = [float(whole[end][figure.name]) if known else None for end in ("value", "low", "high")]
            summary |= dict(zip(figure.columns, values, strict=False))
    return summary | {"cache_parity": float(parity["max_kld"].max()) if len(parity) else None}


def score(golden: Golden, outputs: Outputs, decode: AnswerDecoder, image_token_id: int | None) -> Scores:
    """Compare outputs with the reference; raise EngineError for embeddings of another shape than the reference's."""
    rows, answers = [], []
    for example in golden.examples():
        answer = outputs.answers[example.id]
        rows += _position_rows(example, answer.logits)
        answers.append(_answer_row(example, answer, decode, image_token_id))
    positions, answer_table = pd.DataFrame(rows, columns=POSITION_COLUMNS), pd.DataFrame(answers)
    images = pd.DataFrame(_image_rows(golden, outputs.embeds), columns=IMAGE_COLUMNS)
    figures = aggregate(positions, answer_table, images)
    return Scores(positions, answer_table, images, parity_table(outputs.parity), figures)


def score_fault(golden: Golden, decode: AnswerDecoder, image_token_id: int | None) -> Scores:
    """Return the tables of a bundle that does not run: empty answers, no figures."""
    rows = [_answer_row(example, Answer(example.logits, []), decode, image_token_id) for example in golden.examples()]
    columns = (POSITION_COLUMNS, IMAGE_COLUMNS, PARITY_COLUMNS, FIGURE_COLUMNS)
    positions, images, parity, figures = (pd.DataFrame(columns=names) for names in columns)
    return Scores(positions, pd.DataFrame(rows), images, parity, figures)
