"""Portable ONNX graphs: export with an explicit KV cache, and an ONNX Runtime session that decodes."""
