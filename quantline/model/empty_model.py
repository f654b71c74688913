"""The model that config.json describes, without weights, with the checkpoint's names.

Every module has the name that the checkpoint gives it, and every layer that can be rounded is an
nn.Linear of its own, with its weight as [out, in].
"""

from pathlib import Path

from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantline.errors import Failure, StageError
from quantline.model.configuration import read_config
from quantline.model.device import device
from quantline.model.experts import split_experts
from quantline.model.find_family import family_of
from quantline.model.meta_model import meta_model


def empty_model(folder: Path) -> PreTrainedModel:
    """Build the model on the meta device, in float32.

    transformers builds it from its own code, never from code of the checkpoint. Buffers that are
    not stored (the frequencies of the rotary embedding) are real.

    Raises:
        StageError: unsupported_architecture.
    """
    config = read_config(folder)
    family = family_of(config)
    if family is None:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected a model in {folder} that transformers knows, found none; take another model",
        )
    model = meta_model(config)
    with init_empty_weights():
        replace_conv1d(model)
        split_experts(model, family.expert_names)
    model.tie_weights()
    rename_modules(model, family.renamed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device()), persistent=False)
    return model.eval()


def replace_conv1d(model: nn.Module) -> None:
    """Put an nn.Linear in the place of every Conv1D, GPT-2's linear layer stored as [in, out]."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, nn.Linear(module.nx, module.nf))


def rename_modules(model: nn.Module, names: dict[str, str]) -> None:
    """Register modules under the checkpoint's names; the model's code finds them by its own."""
    for parent in list(model.modules()):
        for own, stored in names.items():
            if own not in parent._modules:
                continue
            children = parent._modules.items()
            parent._modules = {stored if name == own else name: child for name, child in children}
            parent.__dict__[own] = parent._modules[stored]
