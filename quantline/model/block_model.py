"""A model without weights, whose decoder blocks are given theirs one at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantline.freed_memory import return_freed_memory
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.empty_model import empty_model
from quantline.model.experts import Experts, experts_in
from quantline.model.torch_numbers import computed_with


class BlockModel:
    """The model that config.json describes, on the meta device.

    Every layer that can be rounded is an nn.Linear of its own, with its weight as [out, in].

    Attributes:
        model: transformers' model.
        checkpoint: Where its weights are.
        path: Of the list of decoder blocks.
        blocks: The decoder blocks.
        head: The layer that makes logits.
        names: Path of a parameter or of a buffer that is stored → its name in the checkpoint.
    """

    def __init__(
        self, checkpoint: Checkpoint, known: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Build the model.

        Args:
            checkpoint: The model.
            known: Tensors that are in memory already, by their names.

        Raises:
            StageError: unsupported_architecture.
        """
        self.checkpoint = checkpoint
        self._known = known or {}
        self.arch: Architecture = checkpoint.arch
        self.model: PreTrainedModel = empty_model(checkpoint)
        self.path = self.arch.block_path
        self.blocks: list[nn.Module] = list(self.model.get_submodule(self.path))
        self.head: Any = self.model.get_output_embeddings()
        self.names = self._names()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _names(self) -> dict[str, str]:
        if self.arch.structure is not None:
            return self.arch.structure.names_of_paths
        names: dict[str, str] = {}
        first: dict[int, str] = {}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            names[path] = first.setdefault(id(parameter), path)
        if self.arch.tied:  # the head's path comes first in no family, but nothing says so
            names[self._head_weight()] = self.arch.embedding
        return names

    def _head_weight(self) -> str:
        path = next(path for path, module in self.model.named_modules() if module is self.head)
        return f"{path}.weight"

    def block_path(self, index: int) -> str:
        """Return the path of a block."""
        return f"{self.path}.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the linear layers of a block that belong to it, by their names."""
        found = {}
        own = set(self.arch.linears_of(index))
        for inner, module in self.blocks[index].named_modules():
            if isinstance(module, nn.Linear):
                name = self.names[f"{self.block_path(index)}.{inner}.weight"]
                layer = name.removesuffix(".weight")
                if layer in own:
                    found[layer] = module
        return found

    def experts(self, index: int) -> list[tuple[Experts, list[list[str]]]]:
        """Return the modules of experts of a block, with the names of each expert's layers."""
        found = []
        for inner, module in experts_in(self.blocks[index]).items():
            start = f"{self.block_path(index)}.{inner}"
            layers = [
                [
                    self.names[f"{start}.{name}.weight"].removesuffix(".weight")
                    for name in module.linears(number)
                ]
                for number in range(len(module))
            ]
            found.append((module, layers))
        return found

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Yield a block with its weights in memory."""
        paths = [path for path in self.names if path.startswith(f"{self.block_path(index)}.")]
        with self._in_memory(paths):
            yield self.blocks[index]

    @contextmanager
    def outside_loaded(self, head: bool = False) -> Iterator[None]:
        """Have what is around the blocks in memory; the head too if it is asked for."""
        inside = f"{self.path}."
        own_head = {self.arch.head, self.arch.head_bias} if not self.arch.tied else set()
        paths = [
            path
            for path, name in self.names.items()
            if not path.startswith(inside) and (head or name not in own_head)
        ]
        with self._in_memory(paths):
            yield

    @contextmanager
    def _in_memory(self, paths: list[str]) -> Iterator[None]:
        """Give tensors their values, on the device of computation, and take them away again."""
        try:
            values: dict[str, torch.Tensor] = {}
            for path in paths:
                name = self.names[path]
                if name not in values:
                    values[name] = self._value(name)
                self._put(path, values[name])
            del values
            yield
        finally:
            for path in paths:
                self._put(path, None)
            return_freed_memory()

    def _value(self, name: str) -> torch.Tensor:
        """Return a tensor of the checkpoint; floats in float32."""
        if name in self._known:
            return self._known[name]
        return computed_with(self.checkpoint.raw(name)).to(device())

    def _put(self, path: str, value: torch.Tensor | None) -> None:
        """Set a parameter or a buffer; None puts it on the meta device."""
        parent, _, name = path.rpartition(".")
        module = self.model.get_submodule(parent)
        if name in module._buffers:
            old_buffer = module._buffers[name]
            assert old_buffer is not None
            module._buffers[name] = old_buffer.to("meta") if value is None else value
            return
        old = module._parameters[name]
        assert old is not None
        new = old.detach().to("meta") if value is None else value
        module._parameters[name] = nn.Parameter(new, requires_grad=False)
