"""From a GGUF file to a Hugging Face folder of the model in it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from quantline.causes import reading_foreign
from quantline.errors import Failure
from quantline.files import write_json
from quantline.ingest.dequantize.codes_writer import CodesWriter
from quantline.ingest.dequantize.gguf.codes import kept_codes
from quantline.ingest.dequantize.gguf.configuration import configuration_of
from quantline.ingest.dequantize.gguf.file import GgufFile, plain_values, shortest
from quantline.ingest.dequantize.gguf.tensors import mapper, restored_blocks
from quantline.ingest.dequantize.gguf.tokenizer import write_tokenizer
from quantline.ingest.dequantize.plain_checkpoint import PlainWriter, rounded
from quantline.ingest.dequantize.stored import PLAIN
from quantline.model.configuration import CONFIG
from quantline.model.configuration_limits import check_numbers
from quantline.model.dtypes import STORED_NAMES
from quantline.model.meta_model import meta_model

NOT_OF_THE_MODEL = ("_name_or_path", "_model_name_or_path", "unk_token_id")
EXPECTED = "a model that transformers and llama.cpp read alike"


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, EXPECTED)
def write_folder(path: Path, target: Path) -> dict[str, Any]:
    """Write the Hugging Face folder of a file's model.

    Args:
        path: The file.
        target: A new folder.

    Returns:
        The step for the manifest's transforms.

    Raises:
        StageError: missing_shard, missing_tokenizer, unsupported_architecture, non_finite,
            tokenizer_mismatch.
    """
    file = GgufFile(path)
    config = configuration_of(file)
    target.mkdir()
    written = shortest(json.loads(config.to_json_string(use_diff=False)))
    for key in NOT_OF_THE_MODEL:
        written.pop(key, None)
    check_numbers(written)
    write_json(target / CONFIG, written)
    write_tokenizer(file, target)
    model = meta_model(written)
    _write_tensors(file, model, target)
    types = Counter(file.type_of(name) for name in file.tensors)
    return {
        "step": "dequantize",
        "method": "gguf",
        "settings": {"architecture": file.architecture, "types": dict(sorted(types.items()))},
        "dtype": file.dtype,
        "tensors": sum(file.is_quantized(name) for name in file.tensors),
        "left_out": [],
    }


def _write_tensors(file: GgufFile, model: Any, target: Path) -> None:
    """Write the plain tensors, and the blocks that can be handed on as they are."""
    parameters_of = mapper(file, model)
    dtype = PLAIN[STORED_NAMES[file.dtype]]
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    names = list(model.state_dict())
    longest = max(names, key=len)
    experts = max(file.setting("expert_count") or 1, 1)
    codes = CodesWriter(target, [longest] * (len(file.tensors) * experts))
    with PlainWriter(target, [*names, *[longest] * len(file.tensors)]) as writer, codes:
        for block in restored_blocks(file, model, parameters_of):
            for name, values in block.stored.items():
                if name in tied:
                    continue
                rounded(name, values, "float32")  # refuses what is not finite, by its name
                writer.add(name, plain_values(values, dtype, name in block.floats))
            for name, kind, data in kept_codes(file, model, parameters_of, block):
                codes.add_blocks(name, kind, data)
