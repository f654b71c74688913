"""A checkpoint to a quantized GGUF file, by us and by llama.cpp."""
