"""The protocol of a quantization method, and what the calibration knows about a layer.

A method sees one weight matrix and its statistics, never a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, cast

from quantline.config.recipes import Recipe
from quantline.errors import Failure, StageError
from quantline.quantized.tensors import QuantizedTensor
from quantline.registry import load_object

if TYPE_CHECKING:
    import torch

RecipeType = TypeVar("RecipeType", bound=Recipe)

LARGEST_WEIGHT = 1e6  # no trained model comes near it


def scale_hessian(hessian: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """Return H [in, in] of an input that was divided by `scales` [in]."""
    return hessian / scales[:, None] / scales[None, :]


@dataclass(frozen=True)
class LayerStatistics:
    """What the calibration knows about one linear layer.

    What few methods look at is read when it is first used.

    Attributes:
        layer: The module's name, for messages.
        hessian: H, the second moments of the inputs, float32 [in, in].
        fisher_out: G, the diagonal blocks of the second moments of the output gradient, float32
            [blocks, n, n]; None where the recipe does not use them.
        read_input_peak: Reads the largest |x| per input, float32 [in].
        read_input_sample: Reads inputs of some tokens, float32 [tokens, in].
        read_output_importance: Reads how much each output matters, float32 [out].
    """

    layer: str
    hessian: "torch.Tensor"
    fisher_out: "torch.Tensor | None" = None
    read_input_peak: "Callable[[], torch.Tensor] | None" = None
    read_input_sample: "Callable[[], torch.Tensor] | None" = None
    read_output_importance: "Callable[[], torch.Tensor] | None" = None

    @cached_property
    def input_peak(self) -> "torch.Tensor":
        """The largest |x| per input, float32 [in]."""
        assert self.read_input_peak is not None, "these statistics have no peak"
        return self.read_input_peak()

    @cached_property
    def input_sample(self) -> "torch.Tensor":
        """Inputs of some tokens, float32 [tokens, in]."""
        assert self.read_input_sample is not None, "these statistics have no sample"
        return self.read_input_sample()

    @cached_property
    def output_importance(self) -> "torch.Tensor":
        """How much each output matters, float32 [out]."""
        assert self.read_output_importance is not None, "these statistics have no importance"
        return self.read_output_importance()

    def scaled(self, scales: "torch.Tensor", divisors: "torch.Tensor") -> "LayerStatistics":
        """Return H and G of the layer whose weight is W * scales / divisors.

        Its inputs are divided by `scales` [in] and its outputs by `divisors` [out], so that the
        gradients at its outputs grow by as much.
        """
        fisher_out = self.fisher_out
        if fisher_out is not None:
            grown = divisors.reshape(len(fisher_out), -1)
            fisher_out = fisher_out * grown[:, :, None] * grown[:, None, :]
        return LayerStatistics(self.layer, scale_hessian(self.hessian, scales), fisher_out)

    def without_fisher(self) -> "LayerStatistics":
        """Return the same statistics for a method that looks at the layer's own error alone."""
        return replace(self, fisher_out=None)


def check_finite(layer: str, weight: "torch.Tensor") -> None:
    """Check the weight of a layer, scaled or not.

    Raises:
        StageError: non_finite, if a number is NaN or infinite.
    """
    if not weight.isfinite().all():
        raise StageError(
            Failure.NON_FINITE,
            f"expected finite numbers, but the weight of {layer} is not finite; fetch the "
            "checkpoint again, or ask whoever trained it",
        )


def check_size(layer: str, weight: "torch.Tensor") -> None:
    """Check that a layer's weight is finite, and that errors of it can be computed.

    Raises:
        StageError: non_finite, also for a number beyond LARGEST_WEIGHT.
    """
    check_finite(layer, weight)
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest > LARGEST_WEIGHT:
        raise StageError(
            Failure.NON_FINITE,
            f"expected weights of at most {LARGEST_WEIGHT:g} in {layer}, found {largest:.3g}, "
            "whose squares overflow; look at the checkpoint, or take the recipe none",
        )


class Prepared(Protocol):
    """What a method computes once for all layers that read one input."""

    @property
    def damping(self) -> float:
        """The share of the mean diagonal that was added to the Hessian."""


PreparedType = TypeVar("PreparedType", bound=Prepared)


class Method(ABC, Generic[RecipeType, PreparedType]):
    """A method with the options of one recipe.

    Life cycle, for every group of layers that read one input:

        prepared = method.prepare(hessian)                         # once
        quantized = method.quantize(weight, statistics, prepared)  # for each layer
        plain = method.quantize_baseline(layer, weight)            # for its report

    A method whose recipe `scales_inputs` is an InputScalingMethod; one whose recipe's storage is
    "ggml" is a BlockMethod instead (quantline/methods/ggml/method.py).
    """

    def __init__(self, recipe: RecipeType) -> None:
        """Take the options of a recipe."""
        self.recipe = recipe

    def prepare(self, hessian: "torch.Tensor") -> PreparedType | None:
        """Compute what all layers with this Hessian share.

        Args:
            hessian: H, the second moments of their inputs, float32 [in, in]; divided by the input's
                scales if there are any (`scale_hessian`).

        Returns:
            What `quantize` gets as `prepared`; None if the method has nothing to share.

        Raises:
            StageError: hessian_not_positive_definite.
        """
        return None

    @abstractmethod
    def quantize(
        self, weight: "torch.Tensor", statistics: LayerStatistics, prepared: PreparedType | None
    ) -> QuantizedTensor:
        """Quantize one linear weight.

        Args:
            weight: float32 [out, in].
            statistics: Of the layer.
            prepared: What `prepare` returned for its Hessian.

        Returns:
            The quantized weight, of the recipe's storage.

        Raises:
            StageError: non_finite, unsupported_width.
        """

    @abstractmethod
    def quantize_baseline(self, layer: str, weight: "torch.Tensor") -> QuantizedTensor:
        """Round a weight float32 [out, in] plainly: what the layer's report compares with."""


class InputScales(NamedTuple):
    """Scales of an input.

    Attributes:
        scales: float32 [in]; weights are multiplied by them and the input is divided.
        strength: AWQ: how far, in logarithms, towards the scales of least error (0 to 1);
            SmoothQuant: the exponent; None without scaling.
    """

    scales: "torch.Tensor"
    strength: float | None


@dataclass(frozen=True)
class SharedInput:
    """The layers that read one input, in order.

    Attributes:
        weights: float32 [out, in] each.
        statistics: Of each layer; G is not part of them.
    """

    weights: "list[torch.Tensor]"
    statistics: list[LayerStatistics]


class InputScalingMethod(Method[RecipeType, PreparedType]):
    """A method that scales the inputs of layers before it rounds them.

    Attributes:
        strength_key: What the manifest calls the strength of the scales.
    """

    strength_key: ClassVar[str]

    @abstractmethod
    def search_scales(
        self, shared: SharedInput, divisors: "list[torch.Tensor] | None"
    ) -> InputScales | None:
        """Search the scales of an input.

        Args:
            shared: The layers that read it.
            divisors: Scales of the next layer's input, folded into these rows as divisors [out];
                None where the rows are not divided.

        Returns:
            None if no scales keep every layer at least as good as without scaling, given the
            divisors. Without divisors there always are some.
        """

    @abstractmethod
    def remaining_error(
        self, weight: "torch.Tensor", scales: "torch.Tensor", statistics: LayerStatistics
    ) -> float:
        """Return the error that rounding to nearest leaves with these scales [in]."""

    def extra_report(
        self,
        weight: "torch.Tensor",
        stored: "torch.Tensor",
        scales: "torch.Tensor",
        statistics: LayerStatistics,
    ) -> dict[str, Any]:
        """Return what else a layer's report says of its rounding.

        Args:
            weight: The unquantized weight [out, in].
            stored: The rounded weight for inputs divided by `scales`, [out, in].
            scales: [in].
            statistics: Of the layer.
        """
        return {}


def load_method(recipe: Recipe) -> Any:
    """Import the implementation of a recipe's method and give it the recipe's options."""
    assert recipe.implementation, f"{recipe.method} leaves the weights as they are"
    implementation = cast(Callable[[Recipe], Any], load_object(recipe.implementation))
    return implementation(recipe)
