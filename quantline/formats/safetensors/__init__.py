"""Safetensors folders, for transformers and vLLM."""
