"""How vLLM reads a quantization_config, in short, and whether a bundle agrees with it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantline.files import read_json
from quantline.model.meta_model import meta_model

# Layers that vLLM makes one of: all have one scheme, or none is quantized.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
# Where vLLM has a module, if not where the checkpoint has it.
MOVED = {
    "model.altup_projections": "model.self_decoder.altup_projections",
    "model.per_layer_model_projection": "model.self_decoder.per_layer_model_projection",
}


def shapes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensor → its type and shape, of all files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def quantized_in(names: Iterable[str]) -> set[str]:
    """Return the modules that are quantized in a folder with these tensors."""
    end = ".weight_scale"
    return {name.removesuffix(end) for name in names if name.endswith(end)}


def matches(module: str, pattern: str) -> bool:
    """Whether a target or an entry of `ignore` means a module, by its name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern


def schemes_of(config: dict[str, Any], module: str) -> list[str]:
    """Return the groups of a quantization_config that a linear layer is in."""
    if any(matches(module, pattern) for pattern in config["ignore"]):
        return []
    groups = config["config_groups"].items()
    by_name = [name for name, group in groups if any(matches(module, t) for t in group["targets"])]
    return by_name or [name for name, group in groups if "Linear" in group["targets"]]


def disagreements(folder: Path) -> list[str]:
    """Return what vLLM's rules find wrong with a bundle, in sentences."""
    content = read_json(folder / "config.json")
    config = content["quantization_config"]
    shapes = shapes_of(folder)
    quantized = quantized_in(shapes)
    matrices = {
        name.removesuffix(".weight")
        for name, (_, shape) in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    model = meta_model(content)
    modules = {name: module for name, module in model.named_modules() if name}
    found = []
    for module in sorted(quantized):
        if len(schemes_of(config, module)) != 1:
            found.append(f"{module} is in {schemes_of(config, module)}")
    embeddings = {n for n, module in modules.items() if isinstance(module, torch.nn.Embedding)}
    for module in sorted(matrices - quantized - embeddings):
        served = module
        for old, new in MOVED.items():
            served = served.replace(old, new)
        if schemes_of(config, served):
            found.append(f"{served} is not quantized, but not ignored either")
    stored = {name.rpartition(".")[0] for name in shapes}
    for pattern in config["ignore"]:
        if not any(matches(module, pattern) for module in {*modules, *stored}):
            found.append(f"{pattern} is ignored, but no module")
        found += [f"{m} is quantized, but ignored" for m in quantized if matches(m, pattern)]
    for parts in FUSED:
        for parent in {module.rpartition(".")[0] for module in quantized}:
            own = [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in stored]
            if len({(m in quantized, *schemes_of(config, m)) for m in own}) > 1:
                found.append(f"{own} are one layer in vLLM")
    return found
