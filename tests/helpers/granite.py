"""A model of a family without a table, Granite, and a converter for it as llama.cpp has one."""

from pathlib import Path

from quantline.formats.gguf.converter.conversion import conversion_of
from quantline.formats.gguf.converter.release import SCRIPT
from quantline.model.gguf_checkpoint import GgufCheckpoint
from tests.helpers.models import place_model
from tests.helpers.project import ROOT

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
# What llama.cpp's own does for Granite, in a few lines: names by gguf's map, the rows of q and k
# interleaved, and the multipliers. It also writes down which environment variables it sees.
CONVERTER = """
import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path

# Before anything of quantline is imported, which sets more.
(Path(__file__).parent / "environment").write_text("\\n".join(sorted(os.environ)))
sys.path.insert(0, ROOT)

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from quantline.formats.gguf.vocabulary import write_vocabulary
from quantline.model.family import interleave_halves
from quantline.text.tokenizer import Tokenizer

parser = ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype")
parser.add_argument("--mmproj", action="store_true")
arguments = parser.parse_args()
if arguments.mmproj:
    PROJECTOR
matrix_type = gguf.GGMLQuantizationType[arguments.outtype.upper()]
config = json.loads((arguments.model / "config.json").read_text())

writer = gguf.GGUFWriter(arguments.outfile, "granite")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
writer.add_vocab_size(config["vocab_size"])
writer.add_attention_scale(config["attention_multiplier"])
writer.add_embedding_scale(config["embedding_multiplier"])
writer.add_residual_scale(config["residual_multiplier"])
writer.add_logit_scale(config["logits_scaling"])
write_vocabulary(writer, Tokenizer(arguments.model), config["vocab_size"])

name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE, config["num_hidden_layers"])
for name, tensor in sorted(load_file(arguments.model / "model.safetensors").items()):
    gguf_name = name_map.get_name(name, try_suffixes=(".weight",))
    tensor = tensor.astype(np.float32)
    if "q_proj" in name:
        tensor = tensor[interleave_halves(len(tensor), config["num_attention_heads"])]
    if "k_proj" in name:
        tensor = tensor[interleave_halves(len(tensor), config["num_key_value_heads"])]
    tensor_type = matrix_type if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
    CHANGE
    data = gguf.quants.quantize(tensor, tensor_type)
    writer.add_tensor(gguf_name, data, raw_dtype=tensor_type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


NO_PROJECTOR = "sys.exit('no images')"


def write_converter(folder: Path, change: str = "", projector: str = NO_PROJECTOR) -> str:
    """Write a checkout of llama.cpp and return its path.

    Args:
        folder: Where to write it.
        change: A statement that is run for each tensor; it sees `gguf_name`, `tensor`,
            `tensor_type` and `arguments`.
        projector: A statement that is run in its place where the towers are asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = CONVERTER.replace("ROOT", repr(str(ROOT))).replace("CHANGE", change)
    script = script.replace("PROJECTOR", projector)
    (folder / SCRIPT).write_text(script)
    return str(folder)


def converted_copy(granite: Path, folder: Path, change: str = "") -> GgufCheckpoint:
    """Copy a model to folder/model and put a converter's file beside the copy.

    Args:
        granite: The model.
        folder: The checkout of the converter is made in it too.
        change: As in `write_converter`.
    """
    copy = folder / "model"
    place_model(granite, copy)
    return conversion_of(copy, write_converter(folder / "checkout", change))
