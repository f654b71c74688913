"""A small model whose layers are degenerate, each in its own way, and its calibration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantline.calibration.block_files import INPUTS, OUTPUTS, BlockWriter
from quantline.calibration.embedding_and_head import EMBEDDING, FINAL, TOKENS
from quantline.calibration.packing import pack
from quantline.calibration.store import INFO, CalibrationStore
from quantline.files import write_json, write_tensors
from quantline.model.checkpoint import Checkpoint

TOKEN_COUNT = 96
Change = Callable[[torch.Tensor], torch.Tensor]


def _set(index: Any, value: float) -> Change:
    def change(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[index] = value
        return values

    return change


def _times(factor: float) -> Change:
    return lambda values: values * factor


# What makes W [out, in] degenerate.
WEIGHTS: dict[str, Change] = {
    "sound": lambda values: values,
    "zero": _times(0),
    "negative zero": lambda values: -(values.abs() * 0),
    "constant column": _set((slice(None), 3), 0.7),
    "constant row": _set(5, 0.3),
    "zero row": _set(7, 0.0),
    "equal weights": _set(slice(None), 0.25),
    "all negative": lambda values: -values.abs(),
    "all positive": lambda values: values.abs(),
    "one outlier": _set((0, 0), 1e4),
    "denormal": _times(1e-40),
    "tiny": _times(1e-12),
    "large": _times(1e5),
    "sparse": lambda values: values * (values > 0.1),
}
# What makes X [tokens, in] degenerate.
INPUT_CASES: dict[str, Change] = {
    "sound": lambda values: values,
    "zero": _times(0),
    "one live input": _set((slice(None), slice(1, None)), 0.0),
    "half dead": _set((slice(None), slice(0, 16)), 0.0),
    "one outlier": _set((slice(None), 5), 1e5),
    "tiny": _times(1e-22),
    "small": _times(1e-9),
    "denormal": _times(1e-40),
    "large": _times(1e8),
    "overflowing": _times(1e25),
    "NaN": _set((0, 0), float("nan")),
    "one token": lambda values: values[:1],
    "equal tokens": lambda values: values[:1].repeat(TOKEN_COUNT, 1),
    "wide range": lambda values: values * torch.logspace(-9, 4, values.shape[1]),
    "negative": lambda values: -values.abs(),
}
# What makes the gradients [tokens, out] degenerate.
GRADIENTS: dict[str, Change] = {
    "sound": lambda values: values,
    "zero": _times(0),
    "half dead": _set((slice(None), slice(0, 16)), 0.0),
    "tiny": _times(1e-18),
    "underflowing": _times(1e-12),
    "large": _times(1e7),
    "overflowing": _times(1e25),
    "infinite": _set((0, 0), float("inf")),
    "one token": lambda values: values[:1],
}
# Statistics that are of no use, so that a report has to say what was done instead.
USELESS = ("zero", "tiny", "denormal", "overflowing", "NaN", "infinite")


def degenerate_model(
    source: Path, folder: Path, draw: Callable[[int, dict[str, Change]], str]
) -> tuple[Checkpoint, CalibrationStore, dict[str, dict[str, str]]]:
    """Copy a model, make its layers degenerate, and write a calibration.

    Args:
        source: A model of the family Llama.
        folder: Where to.
        draw: Chooses a case of a table for the layer of a number.

    Returns:
        The model, its calibration, and layer → {weight, inputs, gradients}: its cases.
    """
    generator = torch.Generator().manual_seed(0)
    before = Checkpoint(source)
    arch = before.arch
    tensors = {name: np.array(before.raw(name)) for name in before.names}
    calibration = folder / "calibration"
    calibration.mkdir(parents=True)
    cases: dict[str, dict[str, str]] = {}
    layers: dict[str, dict[str, Any]] = {}
    number = 0
    groups = 0
    for block in range(arch.layers):
        inputs = BlockWriter(calibration, INPUTS)
        outputs = BlockWriter(calibration, OUTPUTS)
        for group in arch.input_groups(block):
            of_inputs = draw(groups, INPUT_CASES)
            groups += 1
            width = before.shape(f"{group.linears[0]}.weight")[1]
            x = torch.randn(TOKEN_COUNT, width, generator=generator)
            x = INPUT_CASES[of_inputs](x * torch.logspace(-1, 0.5, width))
            hessian = (x.double().T @ x.double() / len(x)).float()
            peak = x.abs().amax(0).nan_to_num(0)
            sample = (x[:8] / peak.clamp(min=1e-20)).nan_to_num(0).half()
            inputs.add(group.linears[0], hessian.numpy(), peak=peak.numpy(), sample=sample.numpy())
            for layer in group.linears:
                name = f"{layer}.weight"
                cases[layer] = {
                    "weight": draw(number, WEIGHTS),
                    "inputs": of_inputs,
                    "gradients": draw(number, GRADIENTS),
                }
                weight = torch.randn(before.shape(name), generator=generator) * 0.05
                weight = WEIGHTS[cases[layer]["weight"]](weight)
                tensors[name] = weight.numpy().astype(tensors[name].dtype)
                g = torch.randn(TOKEN_COUNT, len(weight), generator=generator) * 1e-3
                g = GRADIENTS[cases[layer]["gradients"]](g)
                outputs.add(layer, (g.double().T @ g.double() / len(g)).float().numpy()[None])
                layers[layer] = {
                    "moments": group.linears[0],
                    "tokens": TOKEN_COUNT,
                    "block": block,
                }
                number += 1
        inputs.close(block)
        outputs.close(block)
    hidden = arch.hidden_size
    diagonal, triangle = pack(np.eye(hidden, dtype=np.float32)[None] * 1e-6)
    write_tensors(calibration / EMBEDDING, {"diagonal": diagonal, "triangle": triangle})
    states = torch.randn(16, hidden, generator=generator)
    final = {"peak": np.ones(hidden, np.float32), "sample": states.half().numpy()}
    write_tensors(calibration / FINAL, final)
    tokens = np.arange(TOKEN_COUNT, dtype=np.int32)[None]
    write_tensors(calibration / TOKENS, {"tokens": tokens})
    info = {
        "layers": layers,
        "curvature": True,
        "text_sha256": "",
        "text": "text.txt",
        "tokens": TOKEN_COUNT,
        "seed": 0,
    }
    write_json(calibration / INFO, info)
    model = folder / "model"
    model.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    write_tensors(model / "model.safetensors", tensors, {"format": "pt"})
    return Checkpoint(model), CalibrationStore(calibration), cases
