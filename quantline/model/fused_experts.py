"""Taking apart what transformers fuses: experts in one parameter, and layers stored as [in, out].

How experts are fused is what their module says of itself by transformers' experts protocol
(`use_experts_implementation`): whether matrices are transposed, whether gate and up lie one after
the other or interleaved, whether there are biases and a gate, and what is between up and down.
Modules that are not in the protocol are known by their parameters.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate
from transformers.pytorch_utils import Conv1D

from quantline.model.experts import (
    Expert,
    RoutedExperts,
    SortedExperts,
)

DEFAULT_NAMES = ("gate_proj", "up_proj", "down_proj")
# Takes a fused parameter apart: name inside the new module → part of the tensor, as [out, in].
Parts = Callable[[torch.Tensor], dict[str, torch.Tensor]]


class Join(NamedTuple):
    """How transformers' conversion makes a fused parameter of layers that lie apart.

    Attributes:
        layers: The layers of an expert whose weights it is made of; "" for an expert that is one.
        interleaved: Whether the rows of two layers alternate.
        transposed: Whether a matrix is [in, out] there.
        stacked: Whether experts lie along a dimension of their own; otherwise their rows do.
    """

    layers: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    stacked: bool = True


class Replacement(NamedTuple):
    """A module in the place of another, and how the other's parameters are taken apart.

    Attributes:
        module: The new module.
        parts: Name of a parameter of the old module → what it becomes.
        joins: Name of a parameter with the experts' weights → what turns that around.
    """

    module: nn.Module
    parts: dict[str, Parts]
    joins: dict[str, Join] = {}  # noqa: RUF012 (it is never changed)


def replacement_of(module: nn.Module, names: tuple[str, ...] = DEFAULT_NAMES) -> Replacement | None:
    """Return what stands in for a module; None for one that is not fused.

    Args:
        module: On any device.
        names: What an expert's gate, up and down are called.
    """
    if isinstance(module, Conv1D):
        layer = nn.Linear(module.nx, module.nf)
        return Replacement(layer, {"weight": lambda tensor: {"weight": tensor.T}})
    if isinstance(module, nn.Linear):
        return None
    shapes = {name: tuple(own.shape) for name, own in module.named_parameters(recurse=False)}
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and "down_proj" in shapes:
        return _by_protocol(module, shapes, names)
    return _by_parameters(module, shapes, names)


def _by_parameters(
    module: nn.Module, shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]
) -> Replacement | None:
    """Return what stands in for experts that are not in transformers' protocol."""
    if set(shapes) == {"gate_up_proj", "down_proj"}:
        routed = _routed_and_gated(module, shapes, names)
        return routed or _sorted_and_gated(module, shapes, names)
    if not hasattr(module, "num_experts"):
        return None
    if set(shapes) == {"weight"} and len(shapes["weight"]) == 3:
        return _sorted_layers(shapes["weight"])
    inner = dict(module.named_parameters())
    if set(inner) == {"mlp.w1", "mlp.v1", "mlp.w2"}:
        return _stacked_rows(module, inner["mlp.w1"].shape, names)
    return None


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def _gated(
    names: tuple[str, ...], width: int, inner: int, hidden: Callable[..., torch.Tensor]
) -> Expert:
    """Return an expert of gate, up and down without biases (see Expert)."""
    gate, up, down = names
    layers = {
        gate: _linear(width, inner),
        up: _linear(width, inner),
        down: _linear(inner, width),
    }
    return Expert(layers, hidden, _identity)


def _identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _by_protocol(
    fused: Any, shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]
) -> Replacement:
    """Take apart experts that are described by transformers' protocol."""
    count, first, second = shapes["down_proj"]
    inner, width = (first, second) if fused.is_transposed else (second, first)
    gate, up, down = names
    experts: list[nn.Module] = []
    hidden = _hidden_of(fused)
    norm = fused.post_expert_norm if getattr(fused, "has_post_expert_norm", False) else _identity
    for _ in range(count):
        layers = {gate: _linear(width, inner, fused.has_bias)} if fused.has_gate else {}
        layers[up] = _linear(width, inner, fused.has_bias)
        layers[down] = _linear(inner, width, fused.has_bias)
        experts.append(Expert(layers, hidden, norm))
    parts: dict[str, Parts] = {}
    first_name = "gate_up_proj" if fused.has_gate else "up_proj"
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        if suffix and not fused.has_bias:
            continue
        turn = fused.is_transposed and kind == "weight"
        parts[f"down_proj{suffix}"] = _each(down, kind, turn)
        if fused.has_gate:
            parts[first_name + suffix] = _gate_and_up((gate, up), kind, turn, fused.is_concatenated)
        else:
            parts[first_name + suffix] = _each(up, kind, turn)
    module = RoutedExperts(experts, max(width, inner))
    _keep_rest(fused, module, set(parts))
    first_layers = (gate, up) if fused.has_gate else (up,)
    apart = fused.has_gate and not fused.is_concatenated
    return Replacement(
        module,
        parts,
        {
            first_name: Join(first_layers, apart, fused.is_transposed),
            "down_proj": Join((down,), transposed=fused.is_transposed),
        },
    )


def _hidden_of(fused: Any) -> Callable[..., torch.Tensor]:
    """Return what experts do between their first layers and the last."""
    if not fused.has_gate:
        return fused.act_fn
    if type(fused)._apply_gate is _default_apply_gate:
        return lambda gate, up: fused.act_fn(gate) * up

    def by_own_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if fused.is_concatenated:
            return fused._apply_gate(torch.cat((gate, up), -1))
        return fused._apply_gate(torch.stack((gate, up), -1).flatten(-2))

    return by_own_gate


def _keep_rest(fused: nn.Module, module: nn.Module, taken: set[str]) -> None:
    """Give the new module whatever else the old one has, under its names."""
    for name, child in fused.named_children():
        module.add_module(name, child)
    for name, parameter in list(fused.named_parameters(recurse=False)):
        if name not in taken:
            module.register_parameter(name, parameter)
    for name, buffer in list(fused.named_buffers(recurse=False)):
        persistent = name not in fused._non_persistent_buffers_set
        module.register_buffer(name, buffer, persistent=persistent)


def _each(name: str, kind: str, turn: bool) -> Parts:
    """Take apart a tensor that has one matrix, or bias, for each expert."""

    def parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            f"{number}.{name}.{kind}": one.T if turn else one
            for number, one in enumerate(tensor.unbind(0))
        }

    return parts


def _gate_and_up(names: tuple[str, str], kind: str, turn: bool, concatenated: bool) -> Parts:
    """Take apart a tensor that has gate and up for each expert."""

    def parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        result = {}
        for number, one in enumerate(tensor.unbind(0)):
            both = one.T if turn else one
            halves = both.chunk(2) if concatenated else (both[::2], both[1::2])
            for name, half in zip(names, halves, strict=True):
                result[f"{number}.{name}.{kind}"] = half
        return result

    return parts


def _routed_and_gated(
    fused: Any, shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]
) -> Replacement | None:
    """Take apart experts in the protocol's usual form that do not say so, such as Step 3.7's."""
    count, width, inner = shapes["down_proj"]
    is_usual = shapes["gate_up_proj"] == (count, 2 * inner, width)
    if not is_usual or len(inspect.signature(fused.forward).parameters) != 3:
        return None
    own = getattr(fused, "_apply_gate", None)

    def hidden(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return own(torch.cat((gate, up), -1)) if own else fused.act_fn(gate) * up

    experts: list[nn.Module] = [_gated(names, width, inner, hidden) for _ in range(count)]
    return _of_gated(fused, RoutedExperts(experts, max(width, inner)), names, turn=False)


def _sorted_and_gated(
    fused: Any, shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]
) -> Replacement | None:
    """Take apart Llama 4's experts: transposed, gate before up, on rows sorted by expert."""
    count, inner, width = shapes["down_proj"]
    if shapes["gate_up_proj"] != (count, width, 2 * inner):
        return None
    experts: list[nn.Module] = [
        _gated(names, width, inner, lambda gate, up: up * fused.act_fn(gate)) for _ in range(count)
    ]
    return _of_gated(fused, SortedExperts(experts, max(width, inner)), names, turn=True)


def _of_gated(
    fused: nn.Module, module: nn.Module, names: tuple[str, ...], turn: bool
) -> Replacement:
    """Return experts whose gates lie before their ups, transposed if `turn`, in one parameter."""
    gate, up, down = names
    _keep_rest(fused, module, {"gate_up_proj", "down_proj"})
    return Replacement(
        module,
        {
            "gate_up_proj": _gate_and_up((gate, up), "weight", turn, concatenated=True),
            "down_proj": _each(down, "weight", turn),
        },
        {
            "gate_up_proj": Join((gate, up), transposed=turn),
            "down_proj": Join((down,), transposed=turn),
        },
    )


def _sorted_layers(shape: tuple[int, ...]) -> Replacement:
    """Take apart JetMoE's experts: a linear layer each, on rows sorted by expert."""
    count, outputs, inputs = shape

    def parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{number}.weight": one for number, one in enumerate(tensor.unbind(0))}

    experts: list[nn.Module] = [_linear(inputs, outputs) for _ in range(count)]
    module = SortedExperts(experts, max(inputs, outputs))
    return Replacement(module, {"weight": parts}, {"weight": Join(("",))})


def _stacked_rows(fused: Any, shape: torch.Size, names: tuple[str, ...]) -> Replacement:
    """Take apart DBRX's experts, whose rows lie in one matrix; the last layer's are its columns."""
    count = fused.num_experts
    inner, width = shape[0] // count, shape[1]
    gate, up, down = names
    experts: list[nn.Module] = [
        _gated(names, width, inner, lambda gate, up: fused.mlp.activation_fn(gate) * up)
        for _ in range(count)
    ]

    def parts_of(name: str, turn: bool) -> Parts:
        def parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            return _each(name, "weight", turn)(tensor.reshape(count, inner, width))

        return parts

    return Replacement(
        RoutedExperts(experts, max(width, inner)),
        {
            "mlp.w1": parts_of(gate, turn=False),
            "mlp.v1": parts_of(up, turn=False),
            "mlp.w2": parts_of(down, turn=True),
        },
        {
            "mlp.w1": Join((gate,), stacked=False),
            "mlp.v1": Join((up,), stacked=False),
            "mlp.w2": Join((down,), transposed=True, stacked=False),
        },
    )
