"""Names of the files that an evaluation and a diagnosis leave in their folders, and of what is in them."""

SUMMARY = "summary.json"
FIGURES = "figures.parquet"
ANSWERS = "answers.parquet"
POSITIONS = "metrics.parquet"
IMAGES = "images.parquet"
PARITY = "parity.parquet"

LAYERS = "layers.parquet"
BUDGET = "budget.parquet"
FINDINGS = "findings.json"

CONVERSION, PREPROCESSING, TOTAL = "conversion", "image preprocessing", "total"
"""Sources of the error budget that a reader treats apart; the others are named where they are measured."""

COMPARED = (
    "top1_agreement",
    "top5_overlap",
    "mean_kld",
    "median_kld",
    "p99_kld",
    "max_kld",
    "rms_probability_change",
    "perplexity_ratio",
    "greedy_match",
    "degenerate",
    "task_accuracy",
    "vision_cosine",
    "worst_vision_cosine",
    "vision_error",
    "tokenizer_match",
    "template_match",
    "as_called_match",
    "as_called_accuracy",
)
"""Figures of the whole set that stand in an evaluation's summary and in the table."""
