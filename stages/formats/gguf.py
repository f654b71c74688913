"""GGUF, written tensor by tensor with the gguf package: no 16-bit file in between, no converter."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from stages.checkpoints.architecture import Architecture, architecture
from stages.checkpoints.canonical import Quantized
from stages.checkpoints.reader import Checkpoint
from stages.checkpoints.tokenization import Tokenizer
from stages.config import Variant
from stages.formats import StoredTensor
from stages.formats.gguf_vocabulary import add_vocabulary
from stages.tracking import Failure, StageError

FILE = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
INTERLEAVED = ("llama", "mistral")  # families whose rotary pairs llama.cpp keeps side by side
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def permutation(rows: int, heads: int) -> np.ndarray:
    """Row order that puts the two halves of each head's rotary pairs side by side: int [rows]."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def row_order(facts: Architecture, name: str, rows: int) -> np.ndarray | None:
    """The rows of a source tensor in the order of the file, where they differ."""
    heads = {"attn_q": facts.heads, "attn_k": facts.kv_heads}.get(facts.role(name))
    return permutation(rows, heads) if heads and facts.model_type in INTERLEAVED else None


def tensor_names(model: Checkpoint, facts: Architecture) -> dict[str, str]:
    """Source tensor name → name in the file, through gguf's own map. Raises StageError(unsupported_architecture)."""
    if facts.model_type not in ARCHITECTURES:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected a model among {', '.join(ARCHITECTURES)} for GGUF, "
                                                           f"found {facts.model_type}; choose another format")
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[facts.model_type])
    names = gguf.get_tensor_name_map(kind, facts.layers)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.names
             if name != model.tied_head}
    lost = sorted(name for name, there in found.items() if there is None)
    if lost:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"GGUF has no place for {lost[0]} in {facts.model_type}")
    return found


def add_hyperparameters(writer: gguf.GGUFWriter, facts: Architecture) -> None:
    """Sizes, rotary settings and the like."""
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_block_count(facts.layers)
    writer.add_feed_forward_length(facts.intermediate_size)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_rope_dimension_count(facts.head_dim)
    writer.add_rope_freq_base(facts.rope_theta)
    writer.add_layer_norm_rms_eps(facts.norm_eps)
    writer.add_vocab_size(facts.vocab_size)


def rope_factors(facts: Architecture) -> np.ndarray | None:
    """Llama 3's frequency factors float32 [head_dim / 2] (Llama 3.1's rope scaling), or None without scaling.

    Raises StageError(unsupported_architecture) for another kind of scaling.
    """
    scaling = facts.rope_scaling
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "llama3":
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected rope scaling llama3 or none, found {kind!r}")
    frequencies = facts.rope_theta ** (-np.arange(0, facts.head_dim, 2, dtype=np.float64) / facts.head_dim)
    length = 2 * np.pi / frequencies
    low, high, factor = (scaling[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    context = scaling["original_max_position_embeddings"]
    smooth = np.clip((context / length - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def write(model: Checkpoint, quantized: Quantized, folder: Path, variant: Variant) -> dict[str, str]:
    """Write model.gguf; returns source tensor name → requested type.

    Raises StageError: unsupported_architecture, tokenizer_mismatch.
    """
    facts = architecture(model)
    if any(name.endswith(".bias") and facts.role(name) in ("attn_q", "attn_k") for name in model.names) \
            and facts.model_type in INTERLEAVED:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, "attention biases in a llama model are not written to GGUF")
    names = tensor_names(model, facts)
    plain = {"BF16": "BF16", "F16": "F16", "F32": "F32"}[model.stored_dtype(facts.embedding)]
    plain = FLOATS[variant.dtype] if variant.dtype else plain
    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURES[facts.model_type])
    add_hyperparameters(writer, facts)
    writer.add_name(variant.recipe)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("quantline.recipe", json.dumps(quantized.report["recipe"], sort_keys=True))
    writer.add_string("quantline.calibration", json.dumps(quantized.report["calibration"], sort_keys=True))
    add_vocabulary(writer, Tokenizer(model.folder), model.shape(facts.embedding)[0])

    requested, written = {}, {}
    for name in model.names:
        if name not in names:
            continue
        shape = model.shape(name)
        if name in quantized.blocks_names:
            kind, data, _ = quantized.blocks(name)
            requested[name] = quantized.report["tensors"][name]["requested"]
        else:
            kind, data = (plain if len(shape) > 1 else "F32"), None
            requested[name] = kind
        written[name] = kind
        kind_id = GGMLQuantizationType[kind]
        block, block_bytes = GGML_QUANT_SIZES[kind_id]
        size = int(np.prod(shape)) // block * block_bytes
        row_bytes = (*shape[:-1], shape[-1] // block * block_bytes)
        writer.add_tensor_info(names[name], row_bytes, np.dtype(np.uint8), size, raw_dtype=kind_id)
    factors = rope_factors(facts)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in written.items():
        data = quantized.blocks(name)[1] if name in quantized.blocks_names else _floats(model.tensor(name), kind)
        data = data.reshape(*model.shape(name)[:-1], -1)
        order = row_order(facts, name, len(data)) if data.ndim > 1 else None
        writer.write_tensor_data(np.ascontiguousarray(data if order is None else data[order]))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    return requested


def _floats(tensor: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as the bytes of F32, F16 or BF16: uint8 [..., bytes per row]."""
    data = gguf.quants.quantize(tensor, GGMLQuantizationType[kind])
    return np.ascontiguousarray(data).view(np.uint8)


def read_back(folder: Path, model: Checkpoint) -> dict[str, StoredTensor]:
    """What model.gguf holds, under the source's names and in the source's row order."""
    facts = architecture(model)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    found = {}
    for name, place in tensor_names(model, facts).items():
        if place not in there:
            continue
        tensor, shape = there[place], model.shape(name)
        order = row_order(facts, name, shape[0]) if len(shape) > 1 else None

        def dequantize(tensor=tensor, shape=shape, order=order) -> np.ndarray:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            return values.astype(np.float32) if order is None else values[np.argsort(order)]

        held = tuple(int(size) for size in reversed(tensor.shape))
        found[name] = StoredTensor(tensor.tensor_type.name, held, int(tensor.n_bytes), dequantize)
    return found


def expected(model: Checkpoint, quantized: Quantized, name: str, kind: str) -> np.ndarray:
    """The values, float32, that a tensor stored as `kind` has to have."""
    if name in quantized.blocks_names:
        kind, data, shape = quantized.blocks(name)
        return gguf.quants.dequantize(data, GGMLQuantizationType[kind]).reshape(shape)
    data = gguf.quants.quantize(model.tensor(name), GGMLQuantizationType[kind])
    return gguf.quants.dequantize(data, GGMLQuantizationType[kind])
