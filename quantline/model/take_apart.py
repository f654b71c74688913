"""Taking the fused modules of a model apart, and its parameters in the same way."""

import torch
from accelerate import init_empty_weights
from torch import nn

from quantline.model.fused_experts import DEFAULT_NAMES, Replacement, replacement_of


def replacements_in(
    model: nn.Module, names: tuple[str, ...] = DEFAULT_NAMES
) -> dict[str, Replacement]:
    """Return path → replacement of all fused modules of a model, on the meta device."""
    found: dict[str, Replacement] = {}
    with init_empty_weights():
        for path, module in model.named_modules():
            if any(path.startswith(f"{outer}.") for outer in found):
                continue
            replacement = replacement_of(module, names)
            if replacement is not None:
                found[path] = replacement
    return found


def put_in_place(model: nn.Module, replacements: dict[str, Replacement]) -> None:
    """Put replacements into a model."""
    for path, replacement in replacements.items():
        model.set_submodule(path, replacement.module)


def parts_of(
    path: str, tensor: torch.Tensor, replacements: dict[str, Replacement]
) -> dict[str, torch.Tensor]:
    """Take a parameter of transformers' model apart (see weight_conversion.TakeApart)."""
    module, _, name = path.rpartition(".")
    while module:
        if module in replacements:
            parts = replacements[module].parts.get(name)
            if parts is None:
                return {path: tensor}
            return {f"{module}.{inner}": part for inner, part in parts(tensor).items()}
        module, _, last = module.rpartition(".")
        name = f"{last}.{name}"
    return {path: tensor}
