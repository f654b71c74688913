"""Quantized weights for tests, without a calibration, and the torch model that they stand for."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantline.config.recipes import GroupSize, largest_group
from quantline.formats.container import Container
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter

CONV1D = ("c_attn", "c_proj", "c_fc")  # layers of GPT-2 that transformers keeps as [in, out]
CALIBRATION = {"text_sha256": "0" * 64, "tokens": 0, "seed": 0}


def rounded(
    folder: Path,
    model: Checkpoint,
    bits: int = 4,
    group_size: GroupSize = 32,
    symmetric: bool = False,
    overrides: dict[str, np.ndarray] | None = None,
    recipe: dict[str, Any] | None = None,
    outside: int = 0,
) -> QuantizedModel:
    """Round all linear layers to nearest; bits 0 rounds none.

    Embedding and head are rounded to `outside` bits, symmetrically in groups of 32; 0 for floats.
    """
    import torch

    from quantline.methods.integer.grid import Grid
    from quantline.methods.integer.rtn import round_to_nearest

    folder.mkdir(parents=True)
    writer = QuantizedWriter(folder)
    for name in model.arch.linears() if bits else []:
        weight = torch.from_numpy(model.tensor(f"{name}.weight"))
        size: Any = largest_group([weight.shape[1]]) if group_size == "auto" else group_size
        size = weight.shape[1] if size == -1 else size
        writer.add_linear(name, round_to_nearest(weight, Grid(bits, size, symmetric)))
    for name, tensor in (overrides or {}).items():
        writer.add_override(name, tensor)
    for name in {model.arch.embedding, model.arch.head} if outside else ():
        weight = torch.from_numpy(model.tensor(name))
        linear = round_to_nearest(weight, Grid(outside, 32, True))
        writer.add_outside(name.removesuffix(".weight"), linear)
    recipe = recipe or {"name": "rounded"}
    writer.close({"recipe": recipe, "transforms": [], "calibration": CALIBRATION})
    return QuantizedModel(folder)


def activations_rounded(folder: Path, model: Checkpoint, kind: str) -> QuantizedModel:
    """Round all linear layers to int8 or float8, for a server that rounds activations too."""
    import torch

    from quantline.methods.integer.fp8 import round_to_float8
    from quantline.methods.integer.int8 import round_to_int8

    folder.mkdir(parents=True)
    writer = QuantizedWriter(folder)
    for name in model.arch.linears():
        weight = torch.from_numpy(model.tensor(f"{name}.weight"))
        linear = round_to_int8(weight) if kind == "int8" else round_to_float8(weight)
        writer.add_linear(name, linear)
    report = {
        "recipe": {"name": kind},
        "activations": "dynamic",
        "transforms": [],
        "calibration": CALIBRATION,
    }
    writer.close(report)
    return QuantizedModel(folder)


def torch_model(
    model: Checkpoint, quantized: QuantizedModel, halved: str | None = None, outside: bool = False
) -> Any:
    """Return the float32 torch model whose weights are the canonical ones.

    transformers loads it from an ordinary folder of them. Weights of rounded layers with `halved`
    in their names are rounded to bfloat16 before. With `outside`, embedding and head are rounded
    too, if the store has them.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tensors = {name: model.tensor(name) for name in model.names}
    quantized = quantized.with_outside() if outside else quantized
    for name in quantized.linears:
        tensors[f"{name}.weight"] = quantized.linear(name).dequantize()
    for name, tensor in tensors.items():
        if halved and halved in name:
            tensors[name] = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
    for name in quantized.overrides:
        tensors[name] = quantized.override(name)
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        is_conv1d = module.rpartition(".")[2] in CONV1D and last == "weight"
        if model.config["model_type"] == "gpt2" and is_conv1d:
            tensors[name] = np.ascontiguousarray(tensor.T)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(model.folder / "config.json", folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens_of(model: Checkpoint, batch: int = 2, length: int = 20) -> np.ndarray:
    """Return random token ids int32 [batch, length]."""
    generator = np.random.default_rng(0)
    return generator.integers(0, model.arch.vocab_size, (batch, length)).astype(np.int32)


def torch_logprobs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return log-probabilities float32 [b, n, V] by torch."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(torch.from_numpy(tokens).long()).logits, -1).numpy()


def torch_greedy(model: Any, tokens: np.ndarray, count: int) -> list[int]:
    """Return `count` new tokens after one sequence [1, n], by transformers' own generate."""
    import torch

    ids = torch.from_numpy(tokens).long()
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, tokens.shape[1] :].tolist()


def differing(
    container: Container, folder: Path, model: Checkpoint, quantized: QuantizedModel
) -> list[str]:
    """Return the tensors that a container does not hold exactly."""
    stored = container.read_back(folder, model)
    wrong = []
    for name in model.names:
        if name not in stored or stored[name].shape != model.shape(name):
            wrong.append(name)
            continue
        expected = container.expected(model, quantized, name, stored[name].type)
        if not np.array_equal(stored[name].dequantize(), expected):
            wrong.append(name)
    return wrong
