"""Reference outputs of PyTorch in float32, computed once for each model."""
