"""Looking at what linear layers read and give while a block runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def after_each(
    linears: dict[str, nn.Linear], note: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call note(name, inputs, outputs) whenever one of a block's linear layers has run.

    Args:
        linears: The layers, by their names.
        note: Takes the layer's name, and the tensors [..., in] and [..., out].
    """

    def hook_of(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            note(name, args[0], out)

        return after

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
