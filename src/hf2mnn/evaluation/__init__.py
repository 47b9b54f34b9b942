"""Evaluation and diagnosis of conversions against PyTorch in float32, and benchmark of bundles."""
