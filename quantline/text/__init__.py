"""Documents, and the tokenizer of a checkpoint."""
