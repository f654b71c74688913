"""Layouts of quantized linear layers inside safetensors."""
