"""A model calibrated and rounded as the stages calibrate and quantize do it, without what they track."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.collect import ABOUT, collect
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.dispatch import MODULES, round_block
from quantline.recipes.context import Work
from quantline.files import sha256_json, write_json


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
