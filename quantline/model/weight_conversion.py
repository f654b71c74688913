"""How a model's parameters come out of a checkpoint: transformers' own conversion, as views.

Checkpoints hold some tensors under other names than transformers' modules, and others in pieces
(an expert each) that transformers joins. Its conversion mapping says which. The mapping is run on
the positions of the values instead of the values; so what it does is known exactly, and can be read
one tensor at a time and turned around.
"""

from collections.abc import Callable
from copy import deepcopy
from math import prod
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantline.errors import Failure, StageError
from quantline.model.stored_view import StoredView, plain_view, view_of_positions

Shapes = dict[str, tuple[int, ...]]
# Takes a parameter apart: called with its path and a tensor of its shape, it returns the paths and
# parts of that tensor which quantline's model has instead; (path, tensor) itself for most.
TakeApart = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


class Binding(NamedTuple):
    """What fills a model.

    Attributes:
        views: Path of a parameter or persistent buffer → where its values are stored.
        unused: Stored tensors that nothing of the model is made of.
    """

    views: dict[str, StoredView]
    unused: list[str]


class _Group(NamedTuple):
    """Stored tensors that are converted together.

    Attributes:
        converter: What converts them; None if one tensor is only renamed.
        keys: (key, the pattern of the converter that it fits) in the order of the conversion.
    """

    converter: WeightConverter | None
    keys: list[tuple[str, str]]


def bind(model: PreTrainedModel, stored: Shapes, take_apart: TakeApart) -> Binding:
    """Find out where the values of a model's tensors are stored.

    Args:
        model: transformers' own model, on the meta device.
        stored: Stored tensor → its shape.
        take_apart: How quantline's model differs from transformers'.

    Raises:
        StageError: unsupported_architecture, for a conversion that does more than moving values,
            or that fails.
    """
    groups, unused = _groups(model, stored)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    views: dict[str, StoredView] = {}
    known: dict[Any, tuple[str, _Group, dict[str, StoredView]]] = {}
    for target, group in groups.items():
        if group.converter is None:
            key = group.keys[0][0]
            whole = torch.empty(wanted[target], device="meta")
            kept = take_apart(target, whole).get(target) is whole
            if kept or stored[key] != wanted[target]:
                views[target] = plain_view(key, stored[key])
                continue
        signature = _signature(target, group, stored, wanted)
        if signature in known:
            views |= _same_for(target, group, *known[signature])
            continue
        made = _convert(model, target, group, stored, take_apart)
        known[signature] = (target, group, made)
        views |= made
    return Binding(views, unused)


def _groups(model: PreTrainedModel, stored: Shapes) -> tuple[dict[str, _Group], list[str]]:
    """Sort stored tensors by the (first) parameter that they become; and those that become none."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    unused = []
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target not in state:
            unused.append(key)
        elif pattern is None:
            if target in groups:  # a tensor that is stored under two names
                unused.append(key)
            else:
                groups[target] = _Group(None, [(key, key)])
        else:
            group = groups.setdefault(target, _Group(deepcopy(by_pattern[pattern]), []))
            group.keys.append((key, pattern))
    return groups, unused


def _signature(target: str, group: _Group, stored: Shapes, wanted: Shapes) -> Any:
    """Return what conversions have in common that move values alike."""
    shapes = tuple((pattern, stored[key]) for key, pattern in group.keys)
    if group.converter is None:
        return (_without_numbers(target), stored[group.keys[0][0]], wanted[target])
    operations = (*group.converter.source_patterns, *group.converter.target_patterns)
    return (_without_numbers(target), operations, shapes, wanted[target])


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _same_for(
    target: str, group: _Group, first: str, first_group: _Group, views: dict[str, StoredView]
) -> dict[str, StoredView]:
    """Return a known conversion's views with the names of another block."""
    names = dict(zip(first_group.keys, group.keys, strict=True))
    keys = {old: new for (old, _), (new, _) in names.items()}
    shared = len(target) - len(_common_end(target, first))
    old_start = first[: len(first) - (len(target) - shared)]
    renamed = {}
    for path, view in views.items():
        strips = tuple(strip._replace(key=keys[strip.key]) for strip in view.strips)
        own = target[:shared] + path.removeprefix(old_start)
        renamed[own] = StoredView(view.shape, strips, view.step)
    return renamed


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _convert(
    model: PreTrainedModel, target: str, group: _Group, stored: Shapes, take_apart: TakeApart
) -> dict[str, StoredView]:
    """Run a conversion on positions. Raises StageError as `bind` does."""
    total = sum(prod(stored[key]) for key, _ in group.keys)
    dtype = torch.int32 if total < 1 << 31 else torch.int64
    starts: dict[str, int] = {}
    positions: dict[str, torch.Tensor] = {}
    start = 0
    for key, _ in group.keys:
        starts[key] = start
        end = start + prod(stored[key])
        positions[key] = torch.arange(start, end, dtype=dtype).reshape(stored[key])
        start = end
    if group.converter is None:
        made = {target: positions[group.keys[0][0]]}
    else:
        for key, pattern in group.keys:
            group.converter.add_tensor(target, key, pattern, positions[key])
        try:
            made = group.converter.convert(target, model=model, config=model.config)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise _refusal(target, group, f"{type(error).__name__}: {error}") from error
    views = {}
    for name, value in made.items():
        tensor = value[0] if isinstance(value, list) else value
        for path, part in take_apart(name, tensor).items():
            view = view_of_positions(part.numpy(), starts) if part.dtype == dtype else None
            if view is None:
                raise _refusal(name, group, "one that computes new values")
            views[path] = view
    return views


def _refusal(target: str, group: _Group, found: str) -> StageError:
    key = group.keys[0][0]
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected {target} to be made of {key} and {len(group.keys) - 1} more by moving values, "
        f"as transformers' conversion does for other models, found {found}; take the config.json "
        "that the weights were saved with, or another model",
    )
