"""PyTorch's own answers, kept once per model: what every later stage is compared with."""
