"""Weights in fewer bits: the format that MNN reads, the choice of scales and of bits, and import of what is packed."""
