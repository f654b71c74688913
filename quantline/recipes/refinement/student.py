"""The weights of a rounded model whose scales and norms move, tensor by tensor."""

from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch

from quantline.model.block_model import BlockModel
from quantline.model.device import device
from quantline.model.dtypes import NUMPY_DTYPES
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel
from quantline.quantized.tensors import GroupedLinear
from quantline.recipes.refinement.state import RefinementState

NORMS = "norms"  # the part of norms that lie outside all blocks
WEIGHT = ".weight"


def norms_of(parts: BlockModel, names: Collection[str]) -> dict[str, str]:
    """Return the norms of a model whose weights can move.

    They have one dimension, and no other module computes with them.

    Args:
        parts: The model.
        names: Tensors of the source.

    Returns:
        Path of the weight → its name.
    """
    uses: dict[str, int] = {}
    for name in parts.names.values():
        uses[name] = uses.get(name, 0) + 1
    found = {}
    for path, module in parts.model.named_modules():
        weight = module._parameters.get("weight")
        is_norm = "norm" in type(module).__name__.lower()
        if weight is None or weight.ndim != 1 or not is_norm:
            continue
        stored = parts.names.get(path + WEIGHT, "")
        if stored in names and uses[stored] == 1:
            found[path + WEIGHT] = stored
    return found


class Student(Mapping[str, torch.Tensor]):
    """Tensors of a rounded model, by the names of the unquantized one's; others are not there.

    A group's scale is multiplied by 1 + its change; a norm's weight gets its change added.

    Attributes:
        stored: Whether scales and norms that have moved are rounded as files hold them.
    """

    def __init__(
        self,
        source: TensorSource,
        rounded: QuantizedModel,
        part_of: Mapping[str, str],
        state: RefinementState,
    ) -> None:
        """Take the rounded model.

        Args:
            source: The unquantized one.
            rounded: Its layers as they were rounded, and the norms that scales were folded into.
            part_of: Layer or norm that moves → its part.
            state: How far each has moved.
        """
        self.source = source
        self.rounded = rounded
        self.part_of = part_of
        self.state = state
        self.stored = False
        self._names = frozenset(
            {f"{name}{WEIGHT}" for name in rounded.linears}
            | set(rounded.overrides)
            | {name for name in part_of if name.endswith(WEIGHT)}
        )
        self._layer = lru_cache(maxsize=1)(self._read_layer)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> torch.Tensor:
        layer = name.removesuffix(WEIGHT)
        if layer in self.rounded.linears:
            weight = self.codes(layer) * self.scales(layer)[:, :, None]
            return weight.reshape(len(weight), -1)
        if name in self.part_of:
            return self.norm(name)
        return _on_device(self.rounded.override(name))

    def _read_layer(self, layer: str) -> GroupedLinear:
        linear = self.rounded.linear(layer)
        assert isinstance(linear, GroupedLinear), f"{layer} is in no groups"
        return linear

    def codes(self, layer: str) -> torch.Tensor:
        """Return integers less zero points of a layer, float32 [out, groups, group size]."""
        linear = self._layer(layer)
        integers = _on_device(linear.integers).float()
        zeros = _on_device(linear.zeros).float()
        return integers.reshape(*zeros.shape, linear.group_size) - zeros[:, :, None]

    def scales(self, layer: str) -> torch.Tensor:
        """Return the scales of a layer, float32 [out, groups], as far as they have moved."""
        scales = _on_device(self._layer(layer).scales)
        change = self._change(layer)
        if change is None:
            return scales
        moved = scales * (1 + change)
        return scales_as_stored(moved, scales) if self.stored else moved

    def norm(self, name: str) -> torch.Tensor:
        """Return the weight of a norm, float32 [width], as far as it has moved."""
        is_changed = name in self.rounded.overrides
        weight = _on_device(self.rounded.override(name) if is_changed else self.source.tensor(name))
        change = self._change(name)
        if change is None:
            return weight
        moved = weight + change
        if not self.stored:
            return moved
        dtype = NUMPY_DTYPES[self.source.stored_dtype(name)]
        return _on_device(moved.cpu().numpy().astype(dtype).astype(np.float32))

    def _change(self, name: str) -> torch.Tensor | None:
        part = self.part_of.get(name)
        return None if part is None else self.state.change(part, name)

    def by_change(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient by the change of what moves.

        Args:
            name: A layer or a norm's weight.
            gradient: By its weight: [out, in], or [width].

        Returns:
            [out, groups], or [width].
        """
        if name not in self.rounded.linears:
            return gradient
        codes = self.codes(name)
        by_scales = (gradient.reshape(codes.shape) * codes).sum(-1)
        return by_scales * _on_device(self._layer(name).scales)


def scales_as_stored(moved: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Round scales to bfloat16, which all layouts hold.

    Some hold them in float16, which has not every small bfloat16. A scale that it has stays as it
    was rather than become one that it has not.

    Args:
        moved: float32 of any shape.
        before: Those that were stored, of the same shape.
    """
    rounded = moved.bfloat16().float()
    lost = (before.half().float() == before) & (rounded.half().float() != rounded)
    return torch.where(lost, before, rounded)


def _on_device(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device())
