"""Every architecture that transformers has, as a tiny model, through the stages of the pipeline."""
