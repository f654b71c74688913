"""The forward pass of transformers' own model, nothing taken apart: what quantline's has to equal.

Each block's weights are loaded as it is called and dropped when it has run.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.meta_model import meta_model
from quantline.model.same_bits import same_bits
from quantline.model.stored_view import StoredView
from quantline.model.torch_numbers import computed_with
from quantline.model.weight_conversion import bind


@dataclass
class WholeRun:
    """What one forward pass was.

    Attributes:
        logits: float32 [sequences, length, vocabulary].
        head_inputs: What entered the head, float32 [sequences, length, hidden].
        products: What left the head, before the model did anything to it, as `logits`.
        returns: For each block how many values it returned; 0 for a tensor that is no tuple.
        outside: The tensors outside of the blocks, as they are computed with, by where their values
            are stored.
    """

    logits: torch.Tensor
    head_inputs: torch.Tensor
    products: torch.Tensor
    returns: tuple[int, ...]
    outside: dict[StoredView, torch.Tensor]


@dataclass
class _Seen:
    head_inputs: torch.Tensor | None = None
    products: torch.Tensor | None = None
    returns: dict[int, int] = field(default_factory=dict)


class WholeModel:
    """transformers' model, with weights where they are used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Build the model. Raises StageError as `meta_model` and `bind` do."""
        self.checkpoint = checkpoint
        self.model: PreTrainedModel = meta_model(checkpoint.config)
        self.model.tie_weights()
        binding = bind(self.model, checkpoint.stored_shapes, lambda path, tensor: {path: tensor})
        self.views: dict[str, StoredView] = binding.views
        self._share_views()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device())
        self.model.eval()
        stack = self.model.get_submodule(checkpoint.arch.block_path)
        self.blocks: list[nn.Module] = list(stack)
        self.paths = {id(module): path for path, module in self.model.named_modules()}

    def _share_views(self) -> None:
        """Give tied parameters what the one of them has that is stored."""
        stored: dict[int, StoredView] = {}
        parameters = list(self.model.named_parameters(remove_duplicate=False))
        for path, parameter in parameters:
            if path in self.views:
                stored.setdefault(id(parameter), self.views[path])
        for path, parameter in parameters:
            if id(parameter) in stored:
                self.views.setdefault(path, stored[id(parameter)])

    @same_bits()
    def run(self, tokens: np.ndarray) -> WholeRun:
        """Run the model on tokens, int32 [sequences, length]."""
        seen = _Seen()
        hooks = [self._on_head(seen)]
        for index, block in enumerate(self.blocks):
            hooks += self._on_block(index, block, seen)
        text = self.checkpoint.arch.text_path
        inside = f"{self.checkpoint.arch.block_path}."
        head = f"{self.paths[id(self.model.get_output_embeddings())]}."
        outside = [
            path
            for path in self.views
            if not path.startswith(inside) and (not text or path.startswith((f"{text}.", head)))
        ]
        values = self._load(outside)
        try:
            with torch.no_grad():
                ids = torch.from_numpy(tokens.astype(np.int64)).to(device())
                logits = self.model(input_ids=ids, use_cache=False).logits.float().cpu()
        finally:
            for hook in hooks:
                hook.remove()
            self._drop(outside)
        assert seen.head_inputs is not None and seen.products is not None
        returns = tuple(seen.returns.get(index, 0) for index in range(len(self.blocks)))
        return WholeRun(logits, seen.head_inputs, seen.products, returns, values)

    def _on_head(self, seen: _Seen) -> Any:
        def after(head: nn.Module, args: Any, out: torch.Tensor) -> None:
            seen.head_inputs = args[0].float().cpu()
            seen.products = out.float().cpu()

        return self.model.get_output_embeddings().register_forward_hook(after)

    def _on_block(self, index: int, block: nn.Module, seen: _Seen) -> list[Any]:
        start = f"{self.paths[id(block)]}."
        paths = [path for path in self.views if path.startswith(start)]

        def before(block: nn.Module, args: Any) -> None:
            self._load(paths)

        def after(block: nn.Module, args: Any, out: Any) -> None:
            seen.returns[index] = len(out) if isinstance(out, tuple | list) else 0
            self._drop(paths)

        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def _load(self, paths: list[str]) -> dict[StoredView, torch.Tensor]:
        values: dict[StoredView, torch.Tensor] = {}  # tied parameters have one
        for path in paths:
            view = self.views[path]
            if view not in values:
                values[view] = computed_with(self.checkpoint.read_view(view)).to(device())
            self._put(path, values[view])
        return values

    def _drop(self, paths: list[str]) -> None:
        for path in paths:
            self._put(path, None)

    def _put(self, path: str, value: torch.Tensor | None) -> None:
        parent, _, name = path.rpartition(".")
        module = self.model.get_submodule(parent)
        for tensors in (module._parameters, module._buffers):
            old = tensors.get(name)
            if old is None:
                continue
            new = old.detach().to("meta") if value is None else value
            if tensors is module._parameters:
                new = nn.Parameter(new, requires_grad=False)
            tensors[name] = new


def full_model_logits(checkpoint: Checkpoint, tokens: np.ndarray) -> torch.Tensor:
    """Run transformers' own forward pass.

    Args:
        checkpoint: The model.
        tokens: int32 [sequences, length].

    Returns:
        Logits float32 [sequences, length, vocabulary].
    """
    return WholeModel(checkpoint).run(tokens).logits
