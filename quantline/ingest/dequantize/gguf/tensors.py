"""The tensors of a GGUF file under the names and in the order of a Hugging Face checkpoint.

transformers' own maps are applied a block at a time: from the file's names to those of the model's
parameters, undoing what llama.cpp's converter did to the values, and from there to the names of
published checkpoints.
"""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np

from quantline.ingest.dequantize.gguf.file import GgufFile
from quantline.ingest.dequantize.gguf.rope import FACTORS, FREQUENCIES
from quantline.run.progress import progress

# Of the rotary embedding, which config.json describes.
IN_CONFIG = frozenset({FREQUENCIES, *FACTORS.values()})
BLOCK = re.compile(r"blk\.(\d+)\.")


# Parameter of the model → its values in float32, and whether the file holds all of it as floats.
Parameters = dict[str, tuple[np.ndarray, bool]]
# From names in the file, and what reads them, to the parameters that they are.
Mapper = Callable[[list[str], Callable[[str], np.ndarray]], Parameters]


class Block(NamedTuple):
    """What the tensors of one block, or one outside of all blocks, become.

    Attributes:
        names: The tensors of the file.
        stored: Tensor of the checkpoint → float32 values.
        floats: Those that the file holds as floats, and not as blocks.
    """

    names: list[str]
    stored: dict[str, np.ndarray]
    floats: set[str]


def restored_blocks(file: GgufFile, model: Any, parameters_of: Mapper) -> Iterator[Block]:
    """Yield what the file's tensors become, a block at a time.

    Args:
        file: The file.
        model: transformers' model on the meta device.
        parameters_of: What `mapper` returned.

    Raises:
        StageError: unsupported_architecture, for a tensor that the model has no place for.
    """
    for names in progress(_by_block(file), "dequantizing", "block"):
        parameters = parameters_of(names, file.read)
        stored = stored_names(model, parameters)
        converted = [is_float for name, (_, is_float) in parameters.items() if name not in stored]
        floats = set()
        for name in stored:
            if parameters[name][1] if name in parameters else all(converted):
                floats.add(name)
        yield Block(names, stored, floats)


def stored_names(model: Any, parameters: Parameters) -> dict[str, np.ndarray]:
    """Return parameters of the model under the names, and in the parts, of published files."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: torch.from_numpy(values) for name, (values, _) in parameters.items()}
    reverted = revert_weight_conversion(model, tensors)
    return {name: tensor.contiguous().numpy() for name, tensor in reverted.items()}


def _by_block(file: GgufFile) -> list[list[str]]:
    """Return the names of the tensors, those of each block together."""
    groups: dict[str, list[str]] = {}
    for name in file.tensors:
        if name in IN_CONFIG:
            continue
        match = BLOCK.match(name)
        groups.setdefault(match[0] if match else name, []).append(name)
    return list(groups.values())


def mapper(file: GgufFile, model: Any) -> Mapper:
    """Return a function from names in the file to the parameters that they are."""
    from transformers.integrations.gguf import GGUF_ARCHS

    if file.architecture in GGUF_ARCHS:
        return lambda names, read: _by_conversions(file, model, names, read)
    return _Processed(file, model)


def _by_conversions(
    file: GgufFile, model: Any, names: list[str], read: Callable[[str], np.ndarray]
) -> Parameters:
    """Apply transformers' conversions of an architecture to a block."""
    import torch
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )
    from transformers.integrations.gguf import get_gguf_conversion_mapping

    transforms = get_gguf_conversion_mapping(file.architecture, model.config)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern: dict[str, Any] = {}
    for converter in converters:
        by_pattern |= dict.fromkeys(converter.source_patterns, converter)
    found: dict[str, Any] = {}
    blocks = set()  # targets that the file holds as blocks, at least in part
    step: Any
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            step = found.setdefault(target, deepcopy(by_pattern[pattern]))
        else:
            step = found.setdefault(target, WeightRenaming(name, target))
        if file.is_quantized(name):
            blocks.add(target)
        values = torch.from_numpy(read(name))
        step.add_tensor(target, name, pattern or name, values)
    result = {}
    for target, step in found.items():
        made = step.convert(target, model=model, config=model.config)
        for name, tensor in made.items():
            whole = tensor[0] if isinstance(tensor, list) else tensor
            result[name] = (_as_numpy(whole), target not in blocks)
    return result


class _Processed:
    """The older way: a map of names, and a processor that undoes what the converter did."""

    def __init__(self, file: GgufFile, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self.file = file
        kind = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        self.processor = kind(config=_older_settings(model.config))
        self.names = get_gguf_hf_weights_map(model, self.processor)

    def __call__(self, names: list[str], read: Callable[[str], np.ndarray]) -> Parameters:
        made: dict[str, Any] = {}  # what a processor puts together itself
        made_of_blocks = False
        found: Parameters = {}
        for name in names:
            result = self.processor.process(
                weights=read(name),
                name=name,
                tensor_key_mapping=self.names,
                parsed_parameters={"tensors": made},
            )
            if result.name is None:
                made_of_blocks |= self.file.is_quantized(name)
                continue
            target = self.names.get(result.name)
            if target is None:
                raise self.file.refusal(
                    "tensors that transformers has a place for", f"{name}, which it passes over"
                )
            values = np.ascontiguousarray(result.weights)
            found[target] = (values, not self.file.is_quantized(name))
        for name, tensor in made.items():
            found[name] = (_as_numpy(tensor), not made_of_blocks)
        return found


def _as_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor of floats in float32, and one of bytes as it is."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    values: np.ndarray = tensor.contiguous().numpy()
    return values


def _older_settings(config: Any) -> dict[str, Any]:
    """Return a configuration as the processors look at it."""
    settings = config.to_dict()
    for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "n_head"):
        if hasattr(config, name):
            settings[name] = getattr(config, name)
    return settings
