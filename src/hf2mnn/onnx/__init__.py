"""The portable graph: explicit KV cache, lazy weights, and an ONNX Runtime session that decodes."""
