"""The protocol of a layout, and the grids that its layers have to share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from quantline.config.recipes import GROUP_SIZES, WHOLE_ROW, largest_group
from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts import LAYOUTS
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import GroupedLinear, QuantizedTensor, Scheme
from quantline.registry import load_object

# The `format` of a quantization_config in which activations are rounded too.
ACTIVATION_FORMATS = ("int-quantized", "float-quantized")

Tensor = TypeVar("Tensor", bound=QuantizedTensor)


class Layout(ABC, Generic[Tensor]):
    """How quantized linear layers lie in a safetensors folder.

    Life cycle, when a folder is written:

        layout = load_layout("gptq")
        shard |= layout.tensors(module, linear, dtype)             # of every quantized layer
        config["quantization_config"] = layout.config(schemes, unquantized_modules)

    and when it is read back:

        layout = layout_of(config["quantization_config"])
        names = layout.part_names(module)                          # the first is always there
        layout.stored_type(config, module)
        layout.shape(checkpoint, module)
        layout.dequantize(checkpoint, module, config)

    where `config` is the whole quantization_config.
    """

    one_grid: ClassVar[bool] = False  # whether all layers have to share bits and group size

    @abstractmethod
    def part_names(self, module: str) -> list[str]:
        """Return the tensors that a layer may have.

        The first is there for every quantized layer, and for no other.
        """

    @abstractmethod
    def tensors(self, module: str, linear: Tensor, dtype: npt.DTypeLike) -> dict[str, np.ndarray]:
        """Return a layer's tensors.

        Args:
            module: The layer's name.
            linear: Its quantized weight.
            dtype: Float type of the model's unquantized tensors.

        Raises:
            StageError: unsupported_width; readback_mismatch, for scales that the layout cannot
                hold.
        """

    @abstractmethod
    def config(
        self,
        schemes: Mapping[Scheme, list[str]],
        unquantized_modules: list[str],
        of_experts: Collection[str] = (),
        of_head: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return the quantization_config of config.json.

        Args:
            schemes: Scheme → the layers that are stored by it.
            unquantized_modules: The linear layers that are not quantized.
            of_experts: The quantized layers that are experts', which share one grid.
            of_head: The names of the output head, which may be quantized too.

        Raises:
            StageError: unsupported_width, if the layers have more schemes than the layout allows.
        """

    @abstractmethod
    def stored_type(self, config: dict[str, Any], module: str) -> str:
        """Return what a weight of a layer is stored as, such as "int4"."""

    @abstractmethod
    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int]:
        """Return (out, in) of a stored layer."""

    @abstractmethod
    def dequantize(self, checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> np.ndarray:
        """Return the weight float32 [out, in] that a stored layer stands for."""


def load_layout(name: str, activations: bool = False) -> Layout[Any]:
    """Import a layout.

    Args:
        name: The quant_method that config.json names.
        activations: Whether the server rounds activations too.
    """
    info = LAYOUTS[name]
    reference = info.activations if activations else info.implementation
    assert reference is not None, f"{name} rounds no activations; config/variants.py refuses it"
    return cast(Callable[[], Layout[Any]], load_object(reference))()


def layout_of(config: dict[str, Any]) -> Layout[Any]:
    """Import the layout that a quantization_config describes."""
    return load_layout(config["quant_method"], config.get("format") in ACTIVATION_FORMATS)


class LayerGrid(NamedTuple):
    """What layers that are stored alike share.

    Attributes:
        kind: What one weight is stored as, such as "int4".
        symmetric: Whether the zero point is fixed.
        group_size: Weights that share a scale; None for whole rows.
    """

    kind: str
    symmetric: bool
    group_size: int | None

    @property
    def bits(self) -> int:
        """Bits of one integer."""
        return int(self.kind.removeprefix("int"))

    def __str__(self) -> str:
        groups = "whole rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.kind} {'symmetric' if self.symmetric else 'asymmetric'} in {groups}"


def group_by_grid(schemes: Mapping[Scheme, Iterable[str]]) -> dict[LayerGrid, list[str]]:
    """Return grid → the layers that are stored so, sorted.

    The group size is None where all groups are whole rows, which may differ in length then, and
    where a layer's are so and as long as no group is.
    """
    all_per_row = all(scheme.per_row for scheme in schemes)
    grids: dict[LayerGrid, list[str]] = {}
    for scheme, names in schemes.items():
        by_row = all_per_row or (scheme.per_row and scheme.group_size not in GROUP_SIZES)
        grid = LayerGrid(scheme.kind, scheme.symmetric, None if by_row else scheme.group_size)
        grids.setdefault(grid, []).extend(names)
    ordered = sorted(grids.items(), key=lambda entry: (*entry[0][:2], entry[0].group_size or 0))
    return {grid: sorted(names) for grid, names in ordered}


def shared_group_size(schemes: Iterable[Scheme]) -> int | None:
    """Return the size of smaller groups by which layers of several group sizes become alike.

    None where they are alike already, and where there is none that servers know.
    """
    every = tuple(schemes)
    sizes = {scheme.group_size for scheme in every}
    if len(sizes) == 1 or all(scheme.per_row for scheme in every):
        return None
    size = largest_group(sizes)
    return None if size == WHOLE_ROW else size


def only_grid(schemes: Mapping[Scheme, Iterable[str]]) -> LayerGrid:
    """Return the grid that all layers share.

    Raises:
        StageError: unsupported_width, if there are several.
    """
    grids = list(group_by_grid(schemes))
    if len(grids) != 1:
        raise StageError(
            Failure.UNSUPPORTED_WIDTH,
            "expected one width and group size for all layers, found "
            f"{', '.join(map(str, grids))}; quantize them with one recipe of one group size "
            "and without a budget, or use layout: compressed-tensors",
        )
    return grids[0]


def check_held(module: str, linear: QuantizedTensor, dtype: npt.DTypeLike) -> None:
    """Refuse a layer of which a runtime that computes in a dtype would make infinity.

    Args:
        module: The layer.
        linear: Its integers and scales.
        dtype: Of the bundle, which the weights are in that integers and scales stand for.

    Raises:
        StageError: non_finite.
    """
    if np.dtype(dtype) != np.float16 or not isinstance(linear, GroupedLinear):
        return
    highest = float(np.finfo(np.float16).max)
    if float(np.abs(linear.scales).max(initial=0)) * 2**linear.bits <= highest:
        return
    largest = float(np.abs(linear.dequantize()).max())
    if largest > highest:
        raise StageError(
            Failure.NON_FINITE,
            f"expected weights of {module} that float16 holds, which this bundle is in, found "
            f"{largest:.4g}; save the model in bfloat16 or float32 and load it again",
        )
