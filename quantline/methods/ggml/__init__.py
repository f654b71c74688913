"""Methods for the block types of ggml, llama.cpp's tensor library."""
