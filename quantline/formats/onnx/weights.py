"""Weights for a model whose graph is made: none while it is traced, and few while it is checked."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

LARGEST_OWN = 1 << 16  # values of a weight that `stand_in_weights` does not share between layers


def _replace(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter by make(name, parameter), a shared one by one for all its places."""
    made: dict[int, nn.Parameter] = {}
    originals = list(model.parameters())  # as long as these live, their ids are theirs alone
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                full = f"{prefix}.{name}" if prefix else name
                made[id(parameter)] = make(full, parameter)
            setattr(module, name, made[id(parameter)])
    del originals


@contextlib.contextmanager
def zeros(model: nn.Module) -> Iterator[None]:
    """Let a model have zeros for weights, which take no memory until they are written.

    Each has a memory of its own, so that an exporter does not take several for one.
    """

    def make(_: str, parameter: nn.Parameter) -> nn.Parameter:
        # torch.zeros would write them.
        zero = torch.from_numpy(np.zeros(parameter.shape, np.float32))
        return nn.Parameter(zero, requires_grad=False)

    originals = dict(model.named_parameters())
    _replace(model, make)
    try:
        yield
    finally:
        _replace(model, lambda name, _: originals[name])


def stand_in_weights(model: nn.Module, own: Mapping[str, np.ndarray]) -> None:
    """Give a model random weights that take the memory of one block.

    Matrices of the same name in unlike layers are one.

    Args:
        model: Its parameters are replaced.
        own: Name → values, for the small ones (norms, biases), which can matter.
    """
    generator = torch.Generator().manual_seed(0)
    shared: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def make(name: str, parameter: nn.Parameter) -> nn.Parameter:
        if name in own:
            return nn.Parameter(torch.from_numpy(own[name]), requires_grad=False)
        key = (re.sub(r"\.\d+\.", ".*.", name, count=1), parameter.shape)
        if key not in shared:
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            drawn = torch.randn(parameter.shape, generator=generator)
            shared[key] = drawn / fan_in**0.5
        return nn.Parameter(shared[key], requires_grad=False)

    _replace(model, make)
