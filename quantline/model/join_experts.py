"""Letting transformers load experts that lie apart in a file though it expects them fused.

Its conversion mapping joins the experts of most mixtures, which were published apart. For those
that were published fused, the same operations are registered here, by transformers' own
`register_checkpoint_conversion_mapping`; so a bundle can hold a quantized layer for each.
"""

from pathlib import Path

from transformers import PreTrainedModel
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
)

from quantline.model.checkpoint_files import weight_map
from quantline.model.configuration import read_config
from quantline.model.fused_experts import Join, replacements_in
from quantline.model.meta_model import meta_model

QUANTIZED = (".weight_packed", ".weight")  # what an expert's layer has in a file


def let_transformers_join_experts(folder: Path) -> list[WeightConverter]:
    """Register what joins the experts of a folder that transformers would not join by itself.

    Returns:
        What was registered; nothing for a model that needs nothing.

    Raises:
        StageError: As `meta_model` does.
    """
    names = set(weight_map(folder))
    if not any(".0." in name and name.endswith(".weight_packed") for name in names):
        return []
    model = meta_model(read_config(folder))
    known = _own_conversions(model)
    made = {target for entry in known for target in entry.target_patterns}
    new: dict[str, WeightConverter] = {}
    for path, replacement in replacements_in(model).items():
        inside = _inside_block(path)
        for parameter, join in replacement.joins.items():
            target = f"{inside}.{parameter}"
            if target not in new and not any(target.endswith(pattern) for pattern in made):
                new[target] = _converter(inside, target, join)
    if new:
        register_checkpoint_conversion_mapping(
            type(model).__name__, [*known, *new.values()], overwrite=True
        )
    return list(new.values())


def _own_conversions(model: PreTrainedModel) -> list[WeightConverter]:
    """Return the conversions of a class, or else of its model type."""
    own = get_checkpoint_conversion_mapping(type(model).__name__)
    return own or get_checkpoint_conversion_mapping(model.config.model_type) or []


def _inside_block(path: str) -> str:
    """Return the end of a path that blocks have in common: what follows the block's number."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :])


def _converter(inside: str, target: str, join: Join) -> WeightConverter:
    """Return the conversion that makes a fused parameter of its experts' layers."""
    sources = [".".join(filter(None, (inside, "*", layer, "weight"))) for layer in join.layers]
    operations: list[ConversionOps] = []
    if not join.stacked:
        if join.transposed:
            operations.append(Transpose(0, 1))
        operations.append(Concatenate(dim=0))
        return WeightConverter(sources, target, operations)
    operations.append(MergeModulelist(dim=0))
    if len(sources) > 1:
        operations.append(Concatenate(dim=1))
    if join.interleaved:
        operations.append(Interleave(dim=1, inverse=True))
    if join.transposed:
        operations.append(Transpose(1, 2))
    return WeightConverter(sources, target, operations)
