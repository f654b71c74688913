"""The model that config.json describes, without weights, taken apart as quantline needs it.

Every layer that can be rounded is an nn.Linear of its own, with its weight as [out, in]. Models of
families with a table have the checkpoint's names; the others have transformers' (structure.py).
"""

from torch import nn
from transformers import PreTrainedModel

from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.fused_experts import DEFAULT_NAMES
from quantline.model.meta_model import meta_model
from quantline.model.take_apart import put_in_place, replacements_in


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model on the meta device, in float32.

    transformers builds it from its own code, never from code of the checkpoint. Buffers that are
    not stored (the frequencies of the rotary embedding) are real.

    Raises:
        StageError: unsupported_architecture.
    """
    model = meta_model(checkpoint.config)
    family = checkpoint.arch.family
    names = tuple(family.expert_names) or DEFAULT_NAMES
    put_in_place(model, replacements_in(model, names))
    model.tie_weights()
    rename_modules(model, family.renamed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device()), persistent=persistent)
    return model.eval()


def rename_modules(model: nn.Module, names: dict[str, str]) -> None:
    """Register modules under the checkpoint's names; the model's code finds them by its own."""
    for parent in list(model.modules()):
        for own, stored in names.items():
            if own not in parent._modules:
                continue
            children = parent._modules.items()
            parent._modules = {stored if name == own else name: child for name, child in children}
            parent.__dict__[own] = parent._modules[stored]
