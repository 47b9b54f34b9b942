"""From a runtime's outcome to tables: positions, answers, images, the KV cache; and the figures of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hf2mnn import metrics
from hf2mnn.core.errors import EngineError
from hf2mnn.evaluation.answers import Answer, Outcome
from hf2mnn.evaluation.figures import COLUMNS as FIGURE_COLUMNS
from hf2mnn.evaluation.figures import figures
from hf2mnn.evaluation.names import ANSWERS, COMPARED, FIGURES, IMAGES, PARITY, POSITIONS
from hf2mnn.evaluation.parity import parity_table
from hf2mnn.reference.golden import Golden, GoldenExample, without_repeats
from hf2mnn.reference.tasks import score_answer
from hf2mnn.reference.text import AnswerDecoder

POSITION_COLUMNS = [
    "id",
    "position",
    "after_image",
    "kld",
    "same_top",
    "top5_overlap",
    "reference_logprob",
    "logprob",
]
IMAGE_COLUMNS = ["image", "tokens", "cosine", "worst_cosine", "error"]
AROUND = 20
"""Characters before and after the place where two prompts part."""


@dataclass(frozen=True)
class Scores:
    """positions: one row a teacher-forced position; answers: one row an example; images: one row an image; parity:
    one row a probe and way of feeding the cache; figures: `hf2mnn.evaluation.figures`; summary: those of the comparison,
    None where there was nothing to measure.
    """

    positions: pd.DataFrame
    answers: pd.DataFrame
    images: pd.DataFrame
    parity: pd.DataFrame
    figures: pd.DataFrame
    summary: dict[str, float | None]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Each table by the name of its file."""
        return {
            POSITIONS: self.positions,
            ANSWERS: self.answers,
            IMAGES: self.images,
            PARITY: self.parity,
            FIGURES: self.figures,
        }


def _position_rows(example: GoldenExample, logits: np.ndarray) -> list[tuple]:
    divergence = metrics.kl_divergence(example.logits, logits)
    same = metrics.same_top(example.logits, logits)
    overlap = metrics.top_overlap(example.logits, logits)
    reference = metrics.token_logprobs(example.logits, example.answer_ids)
    other = metrics.token_logprobs(logits, example.answer_ids)
    imaged = bool(example.images)
    return [
        (example.id, index, imaged, float(d), bool(s), float(o), float(p), float(q))
        for index, (d, s, o, p, q) in enumerate(zip(divergence, same, overlap, reference, other, strict=True))
    ]


def first_difference(one: str, other: str) -> str | None:
    """Where two texts part, for a person; None where they are the same."""
    if one == other:
        return None
    at = metrics.common_prefix(one, other)
    made, wanted = (text[max(0, at - AROUND) : at + AROUND] for text in (one, other))
    return f"{made!r} for {wanted!r}"


def _answer_row(example: GoldenExample, answer: Answer, decode: AnswerDecoder, image: int | None) -> dict[str, Any]:
    """One row of the table of answers; scores are None where there is no label, and what only an engine has where there
    is no engine.
    """
    text, called = decode(answer.greedy_ids), answer.as_called_ids
    wanted = example.answer_ids.tolist()
    row = {
        "id": example.id,
        "category": example.category,
        "language": example.language,
        "images": len(example.images),
        "expected": None if example.expected is None else " / ".join(example.expected),
        "reference": example.answer,
        "answer": text,
        "greedy_match": answer.greedy_ids == wanted,
        "prefix_tokens": (shared := metrics.common_prefix(answer.greedy_ids, wanted)),
        "prefix_share": shared / len(wanted),
        "repetition": metrics.repetition(answer.greedy_ids),
        # What PyTorch repeats as well is the model's doing, not the conversion's.
        "degenerate": metrics.ends_in_a_loop(answer.greedy_ids) and not metrics.ends_in_a_loop(wanted),
        "as_called": None,
        "as_called_match": None,
        "tokenizer_match": None,
        "template_match": None,
        "template_difference": None,
        "reference_score": None,
        "score": None,
        "as_called_score": None,
    }
    if called is not None:
        row |= {"as_called": decode(called), "as_called_match": decode(called) == example.answer}
    if answer.prompt_ids is not None:
        made, right = (without_repeats(np.array(ids), image) for ids in (answer.prompt_ids, example.input_ids))
        row["tokenizer_match"] = np.array_equal(made, right)
    if answer.written is not None:
        row["template_difference"] = first_difference(answer.written, example.prompt)
        row["template_match"] = row["template_difference"] is None
    if example.expected is not None:
        for name, said in (("reference_score", example.answer), ("score", text), ("as_called_score", row["as_called"])):
            row[name] = None if said is None else score_answer(example.metric, said, example.expected)
    return row


def _image_rows(golden: Golden, embeds: dict[str, np.ndarray]) -> list[tuple]:
    rows = []
    for name in golden.image_names():
        wanted, seen = golden.image(name).embeds, embeds[name]
        if wanted.shape != seen.shape:
            raise EngineError(
                f"the vision tower gives {list(seen.shape)} for {name}, PyTorch gives {list(wanted.shape)}"
            )
        similar = metrics.cosine(wanted, seen)
        error = metrics.relative_error(wanted, seen)
        rows.append((name, len(similar), float(similar.mean()), float(similar.min()), error))
    return rows


def summarize(table: pd.DataFrame, parity: pd.DataFrame) -> dict[str, float | None]:
    """The figures over the whole set by name, those of COMPARED; mean_kld_low and mean_kld_high; cache_parity,
    the largest KL divergence between two ways of filling the KV cache.
    """
    whole = table[table["group"] == "all"].set_index("figure")
    summary = {name: float(whole["value"][name]) if name in whole.index else None for name in COMPARED}
    summary |= {f"mean_kld_{end}": float(whole[end]["mean_kld"]) for end in ("low", "high")}
    return summary | {"cache_parity": float(parity["max_kld"].max()) if len(parity) else None}


def score(golden: Golden, outcome: Outcome, decode: AnswerDecoder, image_token_id: int | None) -> Scores:
    """Compare an outcome with the reference.

    Raises:
        EngineError: the runtime's embeddings of an image have another shape than the reference's.
    """
    positions, answers = [], []
    for example in golden.examples():
        answer = outcome.answers[example.id]
        positions += _position_rows(example, answer.logits)
        answers.append(_answer_row(example, answer, decode, image_token_id))
    position_table, answer_table = pd.DataFrame(positions, columns=POSITION_COLUMNS), pd.DataFrame(answers)
    image_table = pd.DataFrame(_image_rows(golden, outcome.embeds), columns=IMAGE_COLUMNS)
    parity = parity_table(outcome.parity)
    table = figures(position_table, answer_table, image_table)
    return Scores(position_table, answer_table, image_table, parity, table, summarize(table, parity))


def score_fault(golden: Golden, decode: AnswerDecoder, image_token_id: int | None) -> Scores:
    """The tables of a bundle that does not run: no answers, nothing measured."""
    rows = [_answer_row(example, Answer(example.logits, []), decode, image_token_id) for example in golden.examples()]
    answers, empty = pd.DataFrame(rows), dict.fromkeys(COMPARED)
    summary = empty | {"mean_kld_low": None, "mean_kld_high": None, "cache_parity": None}
    tables = [pd.DataFrame(columns=columns) for columns in (POSITION_COLUMNS, IMAGE_COLUMNS)]
    return Scores(tables[0], answers, tables[1], parity_table({}), pd.DataFrame(columns=FIGURE_COLUMNS), summary)
