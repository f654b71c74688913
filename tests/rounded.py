"""Quantized weights for tests, without a calibration, and the torch model that they stand for."""

import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.model.checkpoint import Checkpoint

CONV1D = ("c_attn", "c_proj", "c_fc")  # layers of GPT-2 that transformers keeps as [in, out]
CALIBRATION = {"text_sha256": "0" * 64, "tokens": 0, "seed": 0}


def rounded(folder: Path, model: Checkpoint, bits: int = 4, group_size: int = 32, symmetric: bool = False,
            overrides: dict[str, np.ndarray] | None = None, recipe: dict | None = None) -> Quantized:
    """All linear layers rounded to the nearest; bits 0 rounds none."""
    import torch

    from quantline.methods.integer import rtn

    folder.mkdir(parents=True)
    writer = QuantizedWriter(folder)
    for name in architecture(model).linears() if bits else []:
        weight = torch.from_numpy(model.tensor(f"{name}.weight"))
        writer.add_linear(name, rtn.quantize(weight, bits, weight.shape[1] if group_size == -1 else group_size, symmetric))
    for name, tensor in (overrides or {}).items():
        writer.add_override(name, tensor)
    writer.close({"recipe": recipe or {"name": "rounded"}, "transforms": [], "calibration": CALIBRATION})
    return Quantized(folder)


def activations_rounded(folder: Path, model: Checkpoint, kind: str) -> Quantized:
    """All linear layers in eight bits, int8 or float8, for a server that rounds activations too."""
    import torch

    from quantline.methods.integer import fp8, int8

    folder.mkdir(parents=True)
    writer = QuantizedWriter(folder)
    for name in architecture(model).linears():
        writer.add_linear(name, (int8 if kind == "int8" else fp8).quantize(torch.from_numpy(model.tensor(f"{name}.weight"))))
    writer.close({"recipe": {"name": kind}, "activations": "dynamic", "transforms": [], "calibration": CALIBRATION})
    return Quantized(folder)


def torch_model(model: Checkpoint, quantized: Quantized, halved: str | None = None):
    """The float32 torch model whose weights are the canonical ones, loaded by transformers from an ordinary folder of them.

    Those of rounded layers with `halved` in their names are rounded to bfloat16 before.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tensors = {name: model.tensor(name) for name in model.names}
    tensors |= {f"{name}.weight": quantized.linear(name).dequantize() for name in quantized.linears}
    tensors |= {name: tensor.astype(ml_dtypes.bfloat16).astype(np.float32) for name, tensor in tensors.items()
                if halved and halved in name}
    tensors |= {name: quantized.override(name) for name in quantized.overrides}
    turned = [name for name in tensors if model.config["model_type"] == "gpt2"
              and name.rsplit(".", 2)[-2:] in ([one, "weight"] for one in CONV1D)]
    tensors |= {name: np.ascontiguousarray(tensors[name].T) for name in turned}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(model.folder / "config.json", folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens_of(model: Checkpoint, batch: int = 2, length: int = 20) -> np.ndarray:
    """Random token ids int32 [batch, length]."""
    return np.random.default_rng(0).integers(0, architecture(model).vocab_size, (batch, length)).astype(np.int32)


def torch_logprobs(made, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [b, n, V] by torch."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(made(torch.from_numpy(tokens).long()).logits, -1).numpy()


def torch_greedy(made, tokens: np.ndarray, count: int) -> list[int]:
    """`count` new tokens after the one sequence of `tokens` [1, n], by transformers' own generate."""
    import torch

    out = made.generate(torch.from_numpy(tokens).long(), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, tokens.shape[1]:].tolist()


def differing(module, folder: Path, model: Checkpoint, quantized: Quantized) -> list[str]:
    """The tensors that a container does not hold exactly."""
    held = module.read_back(folder, model)
    return [name for name in model.names if name not in held or held[name].shape != model.shape(name)
            or not np.array_equal(held[name].dequantize(), module.expected(model, quantized, name, held[name].type))]
