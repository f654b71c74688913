"""Letting transformers load experts that lie apart in a file though it expects them fused.

Its conversion mapping joins the experts of most mixtures, which were published apart. For those
that were published fused, the same operations are registered here, by transformers' own
`register_checkpoint_conversion_mapping`; so a bundle can hold a quantized layer for each.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightTransform,
)

from quantline.model.checkpoint_files import weight_map
from quantline.model.configuration import read_config
from quantline.model.fused_experts import Join
from quantline.model.meta_model import meta_model
from quantline.model.take_apart import replacements_in

SCALE = ".weight_scale"  # what a quantized layer has in a file, however its numbers are stored
PACKED = ".weight_packed"


@contextmanager
def experts_joined(folder: Path) -> Iterator[None]:
    """Have transformers' conversions be those that a folder with quantized layers needs.

    They are as before when it is loaded: whoever saves such a model then saves it as published.

    Raises:
        StageError: As `meta_model` does.
    """
    name, needed = _needed(folder)
    if not needed:
        yield
        return
    before = get_checkpoint_conversion_mapping(name)
    register_checkpoint_conversion_mapping(name, needed, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping(name, before or [], overwrite=True)
        if before is None:
            conversion_mapping._checkpoint_conversion_mapping_cache.pop(name)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard(name)


def _needed(folder: Path) -> tuple[str, list[WeightTransform]]:
    """Return by what name transformers finds a model's conversions, and those its folder needs.

    That is what joins experts which transformers would not join by itself, and its own conversions
    of tensors that are not quantized in a folder with packed layers: for those it would look for
    packed values alone. There are none for a folder without quantized layers.
    """
    names = set(weight_map(folder))
    if not any(name.endswith(SCALE) for name in names):
        return "", []
    model = meta_model(read_config(folder))
    key, known = _own_conversions(model)
    if any(name.endswith(PACKED) for name in names):
        known = [_as_it_is(entry, names) for entry in known]
    made = {
        target
        for entry in known
        if isinstance(entry, WeightConverter) and _has_sources(entry, names)
        for target in entry.target_patterns
    }
    new: dict[str, WeightConverter] = {}
    for path, replacement in replacements_in(model).items():
        inside = _inside_block(path)
        for parameter, join in replacement.joins.items():
            target = f"{inside}.{parameter}"
            if target not in new and not any(target.endswith(pattern) for pattern in made):
                new[target] = _converter(inside, target, join)
    return key, [*known, *new.values()]


def _as_it_is(entry: WeightTransform, names: set[str]) -> WeightTransform:
    """Return a conversion whose sources are not taken for packed ones, if none of them is packed.

    transformers has a conversion look for packed values where its patterns end with ".weight".
    """
    if not isinstance(entry, WeightConverter):
        return entry
    sources = entry._original_source_patterns
    inside = [re.compile(source.replace("*", r"\d+") + "_packed$") for source in sources]
    if any(pattern.search(name) for pattern in inside for name in names):
        return entry
    ends = [source if source.endswith("$") else f"{source}$" for source in sources]
    return entry.copy(ends, entry._original_target_patterns, operations=list(entry.operations))


def _has_sources(entry: WeightConverter, names: set[str]) -> bool:
    """Whether a folder has tensors that a conversion takes, as they are or quantized."""
    for source in entry._original_source_patterns:
        pattern = re.compile(source.removesuffix("$").replace("*", r"\d+"))
        if any(pattern.search(name) for name in names):
            return True
    return False


def _own_conversions(model: PreTrainedModel) -> tuple[str, list[WeightTransform]]:
    """Return the conversions of a class, or else of its model type, and by what name they are kept.

    That name matters: those of a class do not keep transformers from applying those of the model
    type to the same tensors once more, for the model inside.
    """
    of_class = get_checkpoint_conversion_mapping(type(model).__name__)
    if of_class is not None:
        return type(model).__name__, of_class
    model_type = model.config.model_type
    return model_type, get_checkpoint_conversion_mapping(model_type) or []


def _inside_block(path: str) -> str:
    """Return the end of a path that blocks have in common: what follows the block's number."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :])


def _converter(inside: str, target: str, join: Join) -> WeightConverter:
    """Return the conversion that makes a fused parameter of its experts' layers."""
    sources = [".".join(filter(None, (inside, "*", layer, "weight"))) for layer in join.layers]
    operations: list[ConversionOps] = []
    operations.append(MergeModulelist(dim=0))
    if len(sources) > 1:
        operations.append(Concatenate(dim=1))
    if join.interleaved:
        operations.append(Interleave(dim=1, inverse=True))
    if join.transposed:
        operations.append(Transpose(1, 2))
    if not join.stacked:
        operations.append(_Flatten())
    return WeightConverter(sources, target, operations)


class _Flatten(ConversionOps):
    """Puts the rows of all experts one after the other: [experts, rows, columns] to two."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """Return the tensor under its name."""
        ((name, value),) = input_dict.items()
        tensor = value[0] if isinstance(value, list) else value
        return {name: tensor.reshape(-1, tensor.shape[-1]).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: nothing is saved in this form."""
        raise NotImplementedError
