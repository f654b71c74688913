"""What transformers loads from a safetensors folder with quantized layers, found by trying."""

from collections.abc import Iterable, Mapping

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts.layout import group_by_grid
from quantline.model.architecture import Architecture
from quantline.quantized.tensors import Scheme


def check_loadable(
    arch: Architecture, layout: str, schemes: Mapping[Scheme, Iterable[str]], activations: bool
) -> None:
    """Refuse quantized layers that transformers does not load in a layout.

    compressed-tensors knows nn.Linear alone, and with gptqmodel GPT-2 breaks while it is built.
    Experts are fused when they are loaded, which transformers does for symmetric packed integers
    and for eight-bit floats; it expands them then, in the precision of their scales, and does not
    round their activations.

    Args:
        arch: Sizes and names of the model.
        layout: The variant's layout.
        schemes: Scheme → the quantized layers that are stored by it.
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
    shared = _shared_layer(arch, schemes)
    if shared:
        raise _refusal(
            arch,
            expected="recipe none for layers that several blocks share",
            found=f"{shared} quantized, and transformers ties whole weights alone",
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
    of_experts = _schemes_of_experts(arch, schemes)
    if not all(scheme.symmetric for scheme in of_experts):
        raise _refusal(
            arch,
            expected="symmetric integers for the experts",
            found="zero points, which transformers does not take there",
            advice="set symmetric: auto in the recipe, or use format onnx",
        )
    if activations and any(scheme.kind == "int8" for scheme in of_experts):
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


def _shared_layer(arch: Architecture, schemes: Mapping[Scheme, Iterable[str]]) -> str | None:
    """Return a quantized layer whose weight transformers has in several places, if there is one."""
    if arch.structure is None:
        return None
    tensors = arch.structure.tensors
    names = sorted({name for of in schemes.values() for name in of})
    return next((name for name in names if len(tensors[f"{name}.weight"].paths) > 1), None)


def _refusal(arch: Architecture, expected: str, found: str, advice: str) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected {expected} of {arch.model_type} in safetensors, found {found}; {advice}",
    )


def _schemes_of_experts(
    arch: Architecture, schemes: Mapping[Scheme, Iterable[str]]
) -> dict[Scheme, list[str]]:
    """Return the schemes of the layers that are experts'."""
    experts = set(arch.expert_linears())
    of_experts = {scheme: sorted(experts.intersection(of)) for scheme, of in schemes.items()}
    return {scheme: names for scheme, names in of_experts.items() if names}


def check_grids(arch: Architecture, schemes: Mapping[Scheme, Iterable[str]]) -> None:
    """Refuse several grids where a server has one kernel.

    transformers and vLLM fuse all experts of a block when they load them. vLLM fuses queries, keys
    and values too, and gate and up: layers that read one input.

    Raises:
        StageError: unsupported_architecture for experts, unsupported_width for other layers.
    """
    of_experts = _schemes_of_experts(arch, schemes)
    grids = group_by_grid(of_experts)
    if len(grids) > 1:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected one grid for all experts of {arch.model_type} in safetensors, found "
            f"{', '.join(map(str, grids))}; use format onnx, or a recipe without a budget",
        )
    experts = {name for names in of_experts.values() for name in names}
    scheme_of = {name: scheme for scheme, names in schemes.items() for name in names}
    for layer in range(arch.layers):
        for group in arch.input_groups(layer):
            linears = [name for name in group.linears if name in scheme_of and name not in experts]
            if len({scheme_of[name] for name in linears}) > 1:
                raise StageError(
                    Failure.UNSUPPORTED_WIDTH,
                    "expected one grid for layers that read one input, which vLLM fuses, found "
                    f"several for {', '.join(linears)}; use a recipe that gives them the same",
                )
