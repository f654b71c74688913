"""How a model's tensors lie in a GGUF file: their names there, the order of their rows, norms.

Tensor names come from the gguf package's own map, everything else from the family's GgufFamily.
"""

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from quantline.errors import Failure, StageError
from quantline.model.architecture import Architecture
from quantline.model.family import FAMILIES, GgufFamily
from quantline.model.gguf_checkpoint import GgufCheckpoint
from quantline.model.tensor_source import TensorSource

EXPERTS = ".experts."  # in the names of tensors that one tensor of the file holds together


def gguf_family(arch: Architecture) -> GgufFamily:
    """Return how the family of a model lies in GGUF.

    Raises:
        StageError: unsupported_architecture, if quantline does not know.
    """
    family = arch.family.gguf
    if family is None:
        known = sorted(name for name, known_family in FAMILIES.items() if known_family.gguf)
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected a model among {', '.join(known)} for GGUF, found {arch.model_type}; take "
            "model.converter=auto, or another format",
        )
    return family


def gguf_names(source: TensorSource) -> dict[str, str]:
    """Return source tensor → its name in the file.

    The experts of a block share one name: they lie in one tensor.

    Raises:
        StageError: unsupported_architecture, also for a model that llama.cpp would compute
            otherwise.
    """
    if isinstance(source, GgufCheckpoint):
        return {name: part.tensor for name, part in source.parts.items()}
    arch = source.arch
    family = gguf_family(arch)
    problems = [
        *_shape_differences(family, source),
        *_differences(family, arch, source.configuration),
    ]
    for problem in problems:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"llama.cpp knows {family.name} only with {problem}; choose another format",
        )
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(kinds[family.name], arch.layers)
    names = {}
    for name in source.names:
        if name == source.tied_head:
            continue
        gguf_name: str | None
        if EXPERTS in name:
            gguf_name = f"blk.{arch.layer_index(name)}.{arch.part(name)}.weight"
        else:
            gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected a name in GGUF for {name} of {arch.model_type}, found none; choose "
                "another format",
            )
        names[name] = gguf_name
    return names


def group_by_gguf_name(names: dict[str, str]) -> dict[str, list[str]]:
    """Return name in the file → the source's tensors that it consists of, experts by number.

    Args:
        names: What `gguf_names` returned.
    """
    groups: dict[str, list[str]] = {}
    for name, gguf_name in names.items():
        groups.setdefault(gguf_name, []).append(name)
    for members in groups.values():
        members.sort(key=_numbers_in)
    return groups


def _numbers_in(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def is_stacked(names: list[str]) -> bool:
    """Whether a tensor of the file is a stack of these, one matrix per expert."""
    return EXPERTS in names[0]


def dimensions(source: TensorSource, names: list[str]) -> int:
    """Return how many dimensions a tensor of the file has that consists of these."""
    return len(source.shape(names[0])) + is_stacked(names)


def row_order(arch: Architecture, name: str, rows: int) -> np.ndarray | None:
    """Return the rows of a source tensor in the order of the file, int [rows].

    None where the order is the same.
    """
    row_orders = gguf_family(arch).row_orders
    if not row_orders:
        return None
    order = row_orders.get(arch.part(name))
    return None if order is None else order(arch, rows)


def norm_offset(arch: Architecture, name: str) -> np.float32:
    """Return what the file adds to a tensor.

    Checkpoints of some families store the weights of norms less one; GGUF files never do.
    """
    return np.float32(arch.family.norm_offset if name.endswith("norm.weight") else 0)


def _shape_differences(family: GgufFamily, source: TensorSource) -> Iterator[str]:
    """Yield tensors that llama.cpp does not read or misses, as "expected, found ..."."""
    arch = source.arch
    linears = [f"{linear}.bias" for linear in arch.linears()]
    present = [bias for bias in linears if bias in source]
    if family.biases == "none" and present:
        yield f"linear layers without biases, found {present[0]}"
    if family.biases == "all" and len(present) < len(linears):
        absent = next(bias for bias in linears if bias not in source)
        yield f"a bias in every linear layer, found no {absent}"
    if family.own_head and arch.tied:
        yield "a head of its own, found one that is the embedding"
    rope = source.configuration.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or 1.0
    if not family.partial_rotary and share != 1:
        yield f"heads that are rotated whole, found partial_rotary_factor {share}"


def _differences(family: GgufFamily, arch: Architecture, config: dict[str, Any]) -> Iterator[str]:
    """Yield what llama.cpp would compute otherwise than the model, as "expected, found ..."."""
    width = arch.heads * arch.head_dim
    if family.heads_fill_hidden and width != arch.hidden_size:
        yield (
            f"heads that fill the hidden size {arch.hidden_size}, found {arch.heads} of "
            f"{arch.head_dim}"
        )
    if family.layers_of_hidden_scale:
        by_hidden_size = arch.layers == family.layers_of_hidden_scale
        scale = arch.hidden_size // arch.heads if by_hidden_size else arch.head_dim
        found = config.get("query_pre_attn_scalar", 256)
        if found != scale:
            yield f"query_pre_attn_scalar {scale} with {arch.layers} layers, found {found}"
    for key, (value, default) in family.required.items():
        found = config.get(key, default)
        if found != value:
            yield f"{key} {value}, found {found}"
    if family.all_blocks_sparse and len(arch.sparse_layers) != arch.layers:
        yield f"experts in all {arch.layers} blocks, found them in {len(arch.sparse_layers)}"
    for key, default in family.settings.values():
        optional = default is None or key == "sliding_window"
        if config.get(key, default) is None and not optional:
            yield f"a number for {key}, found none"
