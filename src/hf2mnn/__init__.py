"""Turn a Hugging Face vision-language model into MNN bundles, and prove each one against PyTorch."""

__version__ = "0.1.0"
