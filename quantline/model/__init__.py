"""What a checkpoint is, and how the model runs, one decoder block at a time."""
