"""Hugging Face checkpoints: hubs, files, tensors, checks before conversion, LoRA adapters."""
