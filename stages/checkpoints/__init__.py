"""Reading a checkpoint: tensors, architecture, text and tokens, and the model run block by block."""
