"""Quantization of weights: MNN's format, methods, mixed precision, and import of prequantized checkpoints."""
