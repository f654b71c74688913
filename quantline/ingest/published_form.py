"""A mixture that was saved as transformers has it in memory, brought into the form it is published.

transformers joins what files hold of each expert, and takes it apart again when it saves a model,
unless it is told not to (`save_original_format=False`) or something else wrote its parameters.
Tables of families, llama.cpp's converter and servers know the published form alone.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize.plain_checkpoint import PlainWriter
from quantline.model.checkpoint_files import inside, side_files, weight_map
from quantline.model.configuration import read_config
from quantline.model.stored_tensors import StoredTensors
from quantline.run.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Published files number experts. Those of which this is not so are looked at more closely.
JOINED = re.compile(r"\.experts\.\D")


def split_experts(origin: Path, target: Path) -> dict[str, Any] | None:
    """Write the published form of a checkpoint that is in transformers' own, bit by bit.

    Args:
        origin: The checkpoint.
        target: A new folder, which gets the files beside the weights too.

    Returns:
        The step for the manifest's transforms; None for a checkpoint that is published so, of which
        nothing is written.

    Raises:
        StageError: missing_shard, path_escape, unsupported_architecture.
    """
    files = weight_map(origin)
    if not any(JOINED.search(key) for key in files):
        return None
    from quantline.model.meta_model import meta_model

    model = meta_model(read_config(origin))
    stored = StoredTensors(files)
    groups = _joined(model, files)
    if not groups:
        return None
    _check_shapes(origin, model, chain(*groups), stored)
    target.mkdir()
    for name in side_files(origin):
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(inside(origin, name), copy)
    rest = [[key] for key in sorted(set(files) - set(chain(*groups)))]
    with PlainWriter(target, sorted(files)) as writer:
        for keys in progress([*groups, *rest], "splitting experts", "tensor"):
            for name, values in _published(model, keys, stored):
                writer.add(name, values)
    return {"step": "split_experts", "tensors": sum(map(len, groups))}


def _joined(model: "PreTrainedModel", keys: Any) -> list[list[str]]:
    """Return stored tensors that transformers would take apart, those together that belong so.

    A tensor that its conversion starts from is published in that form.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_converters,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    back = [entry.reverse_transform() for entry in reversed(converters)]
    state = model.state_dict()
    groups: dict[str, list[str]] = {}
    for key in sorted(keys):
        published, pattern = apply_converters(key, back)
        if pattern is None or key not in state:
            continue
        _, source = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if source is None:
            groups.setdefault(published, []).append(key)
    return list(groups.values())


def _check_shapes(
    origin: Path, model: "PreTrainedModel", keys: Iterable[str], stored: StoredTensors
) -> None:
    """Refuse joined tensors that are not those of config.json, before they are taken apart.

    Raises:
        StageError: unsupported_architecture.
    """
    state = model.state_dict()
    for key in keys:
        wanted = tuple(state[key].shape)
        if stored.shape(key) != wanted:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {key} in {origin} to be {wanted} as config.json asks, found "
                f"{stored.shape(key)}; take the config.json that the weights were saved with, or "
                "fetch the checkpoint again",
            )


def _published(
    model: "PreTrainedModel", keys: list[str], stored: StoredTensors
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the published tensors that some stored ones are made of."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    arrays = {key: stored.read(key) for key in keys}
    dtypes = {stored.dtype(key) for key in keys}
    if len(dtypes) > 1:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected one dtype of {', '.join(keys)}, which are published in one tensor, found "
            f"{' and '.join(sorted(dtypes))}; save the model again in one",
        )
    dtype = next(iter(arrays.values())).dtype
    # Values are only moved, so whole numbers of their width stand for them.
    width = np.dtype(f"i{dtype.itemsize}")
    tensors = {key: torch.from_numpy(array.view(width)) for key, array in arrays.items()}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        yield name, tensor.contiguous().numpy().view(dtype)
