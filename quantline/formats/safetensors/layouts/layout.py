"""Layouts of quantized linear layers inside safetensors: how integers, scales and zero points become tensors.

Each module has `tensors(module, linear, dtype)`, `config(schemes, kept)` for config.json's quantization_config, where `schemes`
has the rounded layers by scheme and `kept` are the linear layers that are not rounded, `parts(module)`,
`kind(config, module)`, and `dequantize(checkpoint, module, config)`; `config` is the whole quantization_config and a scheme is
(kind, symmetric, group size, whether a group is the whole row).
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType

from quantline.model.architecture import Architecture
from quantline.errors import Failure, StageError

MODULES = {"compressed-tensors": "compressed_tensors", "gptq": "gptq", "awq": "awq"}
Scheme = tuple[str, bool, int, bool]
Grid = tuple[str, bool, int | None]


def load_layout(name: str, activations: bool = False) -> ModuleType:
    """The module of a layout, by the quant_method that config.json names, and whether activations are quantized too."""
    return import_module(f"quantline.formats.safetensors.layouts.{'activations' if activations else MODULES[name]}")


def layout_of(config: dict) -> ModuleType:
    """The module that reads what a quantization_config describes."""
    return load_layout(config["quant_method"], config.get("format") in ("int-quantized", "float-quantized"))


def check_loadable(facts: Architecture, layout: str, scheme: Scheme, activations: bool) -> None:
    """Raise StageError(unsupported_architecture) for rounded layers that transformers does not load in a layout.

    Found by trying. compressed-tensors knows nn.Linear alone, and with gptqmodel GPT-2 breaks while it is built. Experts are
    fused when they are loaded, which transformers does for symmetric packed integers and for eight-bit floats; it expands
    them then, in the precision of their scales, and does not round their activations.
    """
    kind, symmetric, *_ = scheme

    def refusal(expected: str, found: str, advice: str) -> StageError:
        return StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected {expected} of {facts.model_type} in safetensors, found "
                                                            f"{found}; {advice}")

    if facts.family.transposed:
        raise refusal("recipe none for the layers", "rounded ones, which transformers has as Conv1D and loads from no layout",
                      "use format onnx with an integer recipe, or recipe none")
    if facts.experts and layout != "compressed-tensors":
        raise refusal("layout compressed-tensors for the experts", f"{layout}, from which transformers does not load them",
                      "use layout: compressed-tensors")
    if facts.experts and not symmetric:
        raise refusal("symmetric integers for the experts", "zero points, which neither transformers nor vLLM takes there",
                      "set symmetric: true in the recipe, or use format onnx")
    if facts.experts and activations and kind == "int8":
        raise refusal("packed integers or float8 for the experts", "int8 with rounded activations, which transformers does "
                      "not load there", "use recipe fp8 or int8")


def check_mixture(facts: Architecture, schemes: Mapping[Scheme, Iterable[str]]) -> None:
    """Raise StageError(unsupported_architecture) for several grids in a model with experts: transformers fuses those when it
    loads them, and then finds no layers of the names that config.json lists.
    """
    if facts.experts and len(grids := by_grid(schemes)) > 1:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected one grid for all layers of {facts.model_type} in "
                         f"safetensors, found {len(grids)}; use format onnx, or a recipe without a budget")


def by_grid(schemes: Mapping[Scheme, Iterable[str]]) -> dict[Grid, list[str]]:
    """(kind, symmetric, group size) → the layers stored so, sorted. The group size is None where all layers are of whole
    rows, which may differ in length then.
    """
    channel, found = all(whole for *_, whole in schemes), {}
    for (kind, symmetric, size, _), names in schemes.items():
        found.setdefault((kind, symmetric, None if channel else size), []).extend(names)
    return {grid: sorted(names) for grid, names in sorted(found.items())}


def one_scheme(schemes: Mapping[Scheme, Iterable[str]]) -> Grid:
    """The grid that all layers share. Raises StageError(unsupported_width) if there are several."""
    found = list(by_grid(schemes))
    if len(found) != 1:
        raise StageError(Failure.UNSUPPORTED_WIDTH, f"expected one width and group size for all layers, found {found}; "
                                                    "quantize them with one recipe without a budget, or use layout: "
                                                    "compressed-tensors")
    return found[0]
