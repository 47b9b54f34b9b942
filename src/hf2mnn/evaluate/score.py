"""From a runtime's outcome to figures: a table of positions, a table of answers, and one row for the comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hf2mnn.errors import EngineError
from hf2mnn.evaluate.answers import Outcome
from hf2mnn.evaluate.metrics import cosine, kl_divergence, same_top
from hf2mnn.reference.golden import Golden
from hf2mnn.reference.text import AnswerDecoder


@dataclass(frozen=True)
class Scores:
    """positions: one row a teacher-forced position; answers: one row an example; pictures: one row a picture;
    summary: the figures of the comparison."""

    positions: pd.DataFrame
    answers: pd.DataFrame
    pictures: pd.DataFrame
    summary: dict[str, float | None]


def _share(values: pd.Series) -> float | None:
    return float(values.mean()) if len(values) else None


def score(golden: Golden, outcome: Outcome, decode: AnswerDecoder) -> Scores:
    """Compare an outcome with the reference.

    Summary: top1_agreement and mean_kld over all positions; greedy_match, the share of examples whose whole greedy
    answer is PyTorch's, token for token; task_accuracy, the share of labelled examples answered as labelled;
    vision_cosine, mean over all image tokens; as_called_match and as_called_accuracy, the same for what a caller of
    the engine as it is gets. A figure that has nothing to be measured on is None.

    Raises:
        EngineError: the runtime's embeddings of a picture have another shape than the reference's.
    """
    positions, answers, pictures = [], [], []
    for example in golden.examples():
        answer = outcome.answers[example.id]
        divergence, same = kl_divergence(example.logits, answer.logits), same_top(example.logits, answer.logits)
        for index, (value, agrees) in enumerate(zip(divergence, same, strict=True)):
            positions.append((example.id, index, bool(example.pictures), float(value), bool(agrees)))
        text = decode(answer.greedy_ids)
        called = answer.as_called_ids
        answers.append(
            {
                "id": example.id,
                "category": example.category,
                "language": example.language,
                "expected": example.expected,
                "reference": example.answer,
                "answer": text,
                "greedy_match": answer.greedy_ids == example.answer_ids.tolist(),
                "right": None if example.expected is None else text == example.expected,
                "as_called": None if called is None else decode(called),
            }
        )
    for name in golden.picture_names():
        wanted, seen = golden.picture(name).embeds, outcome.embeds[name]
        if wanted.shape != seen.shape:
            raise EngineError(
                f"the vision tower gives {list(seen.shape)} for {name}, PyTorch gives {list(wanted.shape)}"
            )
        similar = cosine(wanted, seen)
        pictures.append((name, len(similar), float(similar.mean()), float(similar.min())))
    position_table = pd.DataFrame(positions, columns=["id", "position", "after_picture", "kld", "same_top"])
    answer_table = pd.DataFrame(answers)
    picture_table = pd.DataFrame(pictures, columns=["picture", "tokens", "cosine", "worst_cosine"])
    return Scores(position_table, answer_table, picture_table, summarize(position_table, answer_table, picture_table))


def summarize(positions: pd.DataFrame, answers: pd.DataFrame, pictures: pd.DataFrame) -> dict[str, float | None]:
    labelled = answers[answers["expected"].notna()]
    called = answers[answers["as_called"].notna()]
    called_labelled = labelled[labelled["as_called"].notna()]
    return {
        "top1_agreement": _share(positions["same_top"]),
        "mean_kld": _share(positions["kld"]),
        "greedy_match": _share(answers["greedy_match"]),
        "task_accuracy": _share(labelled["answer"] == labelled["expected"]),
        "vision_cosine": float(np.average(pictures["cosine"], weights=pictures["tokens"])) if len(pictures) else None,
        "as_called_match": _share(called["as_called"] == called["reference"]),
        "as_called_accuracy": _share(called_labelled["as_called"] == called_labelled["expected"]),
    }
