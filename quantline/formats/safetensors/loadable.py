"""What transformers loads from a safetensors folder with quantized layers, found by trying."""

from collections.abc import Iterable, Mapping

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts.layout import group_by_grid
from quantline.model.architecture import Architecture
from quantline.quantized.tensors import Scheme


def check_loadable(arch: Architecture, layout: str, scheme: Scheme, activations: bool) -> None:
    """Refuse quantized layers that transformers does not load in a layout.

    compressed-tensors knows nn.Linear alone, and with gptqmodel GPT-2 breaks while it is built.
    Experts are fused when they are loaded, which transformers does for symmetric packed integers
    and for eight-bit floats; it expands them then, in the precision of their scales, and does not
    round their activations.

    Args:
        arch: Sizes and names of the model.
        layout: The variant's layout.
        scheme: Of any quantized layer.
        activations: Whether the server rounds activations too.

    Raises:
        StageError: unsupported_architecture.
    """
    if arch.family.transposed or _has_conv1d(arch):
        raise _refusal(
            arch,
            expected="recipe none for the layers",
            found="quantized ones, which transformers has as Conv1D and loads from no layout",
            advice="use format onnx with an integer recipe, or recipe none",
        )
    if not arch.experts:
        return
    if layout != "compressed-tensors":
        raise _refusal(
            arch,
            expected="layout compressed-tensors for the experts",
            found=f"{layout}, from which transformers does not load them",
            advice="use layout: compressed-tensors",
        )
    if not scheme.symmetric:
        raise _refusal(
            arch,
            expected="symmetric integers for the experts",
            found="zero points, which neither transformers nor vLLM takes there",
            advice="set symmetric: true in the recipe, or use format onnx",
        )
    if activations and scheme.kind == "int8":
        raise _refusal(
            arch,
            expected="packed integers or float8 for the experts",
            found="int8 with rounded activations, which transformers does not load there",
            advice="use recipe fp8 or int8",
        )


def _has_conv1d(arch: Architecture) -> bool:
    """Whether transformers has a linear layer, of no expert, with its weight as [in, out]."""
    structure = arch.structure
    if structure is None:
        return False
    views = (
        structure.tensors[f"{name}.weight"].view
        for block in structure.linears
        for name in block
        if name not in structure.experts_of_layers
    )
    return any(view is not None and view.step != 1 for view in views)


def _refusal(arch: Architecture, expected: str, found: str, advice: str) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected {expected} of {arch.model_type} in safetensors, found {found}; {advice}",
    )


def check_grids(arch: Architecture, schemes: Mapping[Scheme, Iterable[str]]) -> None:
    """Refuse several grids in a model with experts.

    transformers fuses experts when it loads them, and then finds no layers of the names that
    config.json lists.

    Raises:
        StageError: unsupported_architecture.
    """
    grids = group_by_grid(schemes)
    if arch.experts and len(grids) > 1:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected one grid for all layers of {arch.model_type} in safetensors, found "
            f"{len(grids)}; use format onnx, or a recipe without a budget",
        )
