"""The model that a config.json describes, as transformers' own code builds it, without weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.model.configuration import refusal, transformers_config
from quantline.model.model_class import class_name


def meta_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build the model on the meta device, in float32, with none of the checkpoint's code.

    Its class is the one that config.json names, or the usual one of the model_type where the two do
    not belong together, as for transformers. Buffers that are not stored are real.

    Args:
        config: The content of config.json.

    Raises:
        StageError: unsupported_architecture, for a value that transformers cannot build from, or a
            class that is no model of its configuration.
    """
    known = transformers_config(config)
    model_class = model_class_of(config)
    known.dtype = torch.float32
    for part in known.sub_configs:
        if getattr(known, part, None) is not None:
            getattr(known, part).dtype = torch.float32
    try:
        with init_empty_weights(), _without_initial_values():
            return model_class(known)
    except StageError:
        raise
    except Exception as error:  # whatever a strange value breaks
        raise_if_of_machine(error)
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise refusal(None, f"values that a {known.model_type} can be built of", words) from error


@contextmanager
def _without_initial_values() -> Iterator[None]:
    """Have parameters count as initialized for transformers, as they are while it loads weights.

    They are on the meta device, where drawing values is in vain and takes most of the time. So is
    filling memory that is never read, as torch does where its algorithms are to be deterministic:
    a parameter is in memory, untouched, for the moment before it is put on the meta device.
    """

    def mark(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    hook = register_module_parameter_registration_hook(mark)
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        with guard_torch_init_functions():
            yield
    finally:
        settings.fill_uninitialized_memory = fills
        hook.remove()


def model_class_of(config: dict[str, Any]) -> type[PreTrainedModel]:
    """Return transformers' class of a model. Raises StageError as `meta_model` does."""
    import transformers

    config_class = type(transformers_config(config))

    name = class_name(config)
    try:
        found = getattr(transformers, name, None)
    except Exception as error:  # modules that transformers imports for a name fail in any way
        raise_if_of_machine(error)
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise _refusal(name, f"one that cannot be imported ({words})") from error
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise _refusal(name, "no model of that name in transformers")
    known: Any = found
    if issubclass(config_class, known.config_class or config_class):
        return known
    own = class_name({"model_type": config.get("model_type")})  # as transformers' AutoModel does
    if own == name:
        raise _refusal(name, f"that it is not made of model_type {config.get('model_type')!r}")
    return model_class_of({**config, "architectures": [own]})


def _refusal(name: str, found: str) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected a class of transformers under architectures in config.json, found {name}: "
        f"{found}; take a model that this release of transformers knows",
    )
