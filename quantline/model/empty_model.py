"""The model that config.json describes, without weights, in the checkpoint's own terms: every module has the name that the
checkpoint gives it, and every layer that can be rounded is an nn.Linear of its own, with its weight as [out, in].
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantline.model.device import device
from quantline.model.experts import split_experts
from quantline.model.families import family_of
from quantline.model.checkpoint import read_json


def empty_model(folder: Path) -> nn.Module:
    """The model on the meta device, float32.

    Built by transformers from its own code, never by code from the checkpoint. Buffers that are not stored (the
    frequencies of the rotary embedding) are real.
    """
    config, family = AutoConfig.from_pretrained(folder, trust_remote_code=False), family_of(read_json(folder / "config.json"))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        turn_linears(model)
        split_experts(model, family.expert_names)
    model.tie_weights()
    rename(model, family.renamed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device()), persistent=False)
    return model.eval()


def turn_linears(model: nn.Module) -> None:
    """Put an nn.Linear in the place of every Conv1D, GPT-2's linear layer with its weight as [in, out]."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, nn.Linear(module.nx, module.nf))


def rename(model: nn.Module, names: dict[str, str]) -> None:
    """Register modules under the names that checkpoints have for them; the model's code finds them by its own as before."""
    for parent in list(model.modules()):
        for own, stored in names.items():
            if own in parent._modules:
                parent._modules = {stored if name == own else name: child for name, child in parent._modules.items()}
                parent.__dict__[own] = parent._modules[stored]
