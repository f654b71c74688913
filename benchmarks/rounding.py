"""A model calibrated and rounded as the stages calibrate and quantize do it, without what they track."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stages.checkpoints.ends import TOKENS
from stages.checkpoints.moments import ABOUT, collect
from stages.checkpoints.reader import Checkpoint
from stages.recipes import MODULES, round_block
from stages.recipes.work import Work
from stages.tracking import sha256_json, write_json


def calibrate(checkpoint: Checkpoint, tokens: np.ndarray, folder: Path, curvature: bool) -> None:
    """Write a new folder of statistics over tokens int32 [sequences, length]."""
    folder.mkdir()
    layers = collect(checkpoint, tokens, folder, 0 if curvature else None)
    save_file({"tokens": np.ascontiguousarray(tokens)}, folder / TOKENS)
    write_json(folder / ABOUT, {"layers": layers, "curvature": curvature, "tokens": int(tokens.size), "seed": 0,
                                "sequences": len(tokens), "length": tokens.shape[1], "text_sha256": sha256_json(tokens.tolist())})


def round_model(work: Work) -> dict[str, dict]:
    """The reports of the rounded layers, which go to the writer; it is left open."""
    layers = {}
    for layer in [*range(work.facts.layers), *([None] if MODULES.get(work.recipe.method) == "ggml" else [])]:
        done = round_block(work, layer)
        work.writer.close_part("rest" if layer is None else f"block-{layer:03d}", done)
        layers |= done["layers"]
    return layers
