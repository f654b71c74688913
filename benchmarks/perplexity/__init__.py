"""Perplexity and divergence beside llama.cpp's own llama-perplexity."""
