"""Names of the files that an evaluation and a diagnosis leave in their folders, and of what is in them."""

SUMMARY = "summary.json"
FIGURES = "figures.parquet"
ANSWERS = "answers.parquet"
POSITIONS = "metrics.parquet"
PICTURES = "pictures.parquet"
PARITY = "parity.parquet"
LOGITS = "logits.safetensors"

LAYERS = "layers.parquet"
BUDGET = "budget.parquet"
FINDINGS = "findings.json"

CONVERSION, PREPROCESSING, TOTAL = "conversion", "image preprocessing", "total"
"""Sources of the error budget that a reader treats apart; the others are named where they are measured."""
