"""Quantized checkpoints that a test makes of a plain one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# quantize(name, tensor) returns the stored tensors that stand for it, or None to keep it.
Quantize = Callable[[str, Any], dict[str, Any] | None]


def write_source(plain: Path, folder: Path, settings: dict[str, Any], quantize: Quantize) -> Path:
    """Write a quantized checkpoint of a plain one's files and return its folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(plain, folder)
    stored = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        made = quantize(name, tensor)
        stored |= {name: tensor} if made is None else made
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_linear(name: str) -> bool:
    """Whether a tensor of the tiny Llama is the weight of a layer that methods quantize."""
    return name.endswith("proj.weight")


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the stored tensors of a checkpoint of one file in place."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


def edit_settings(folder: Path, **changes: Any) -> None:
    """Set options of a checkpoint's quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def state_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's parameters as transformers loads them, in the dtype that it names."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that two models have the same parameters, bit for bit."""
    import torch

    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def plain_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a plain checkpoint, by the names in its files."""
    from quantline.ingest.dequantize.stored import StoredTensors

    stored = StoredTensors(folder)
    return {name: np.array(stored.read(name)) for name in stored.names}
