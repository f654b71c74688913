"""llama.cpp's own quantize, driven through llama-cpp-python, and files for it without data."""

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# A line of llama.cpp's log: the name of a tensor, its type, and the type that it gets.
LINE = re.compile(r"\] (\S+) +- \[[^\]]*\], type = +(\w+), size = [^\n(]*(?:\((\w+)\))?\n")
VOCABULARY = 512
# llama.cpp goes on calling the last callback that it was given, and ctypes does not hold it.
_callbacks: list[Any] = []


def quantize(
    source: Path,
    target: Path,
    mix: str,
    importance: dict[str, np.ndarray] | None = None,
    overrides: dict[str, str] | None = None,
    dry_run: bool = False,
) -> tuple[int, str]:
    """Quantize a GGUF file with llama.cpp.

    Args:
        source: A file in floats.
        target: The file to write.
        mix: llama.cpp's name for the choice of types.
        importance: Tensor → float32 [width] or [matrices, width].
        overrides: Pattern → type.
        dry_run: Only log the types.

    Returns:
        The exit status, and the log.
    """
    import llama_cpp as llama

    settings = llama.llama_model_quantize_default_params()
    settings.nthread = 1
    settings.dry_run = dry_run
    file_type = "LLAMA_FTYPE_ALL_F32" if mix == "F32" else f"LLAMA_FTYPE_MOSTLY_{mix}"
    settings.ftype = getattr(llama, file_type)
    flat = {}
    for name, values in (importance or {}).items():
        flat[name] = np.ascontiguousarray(values, np.float32).reshape(-1)
    if importance is not None:
        entries = (llama.llama_model_imatrix_data * (len(flat) + 1))()
        for entry, (name, values) in zip(entries, flat.items(), strict=False):
            entry.name = name.encode()
            entry.size = len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    if overrides:
        patterns = (llama.llama_model_tensor_override * (len(overrides) + 1))()
        for override, (pattern, ggml_type) in zip(patterns, overrides.items(), strict=False):
            override.pattern = pattern.encode()
            override.type = int(gguf.GGMLQuantizationType[ggml_type])
        settings.tt_overrides = patterns
    log: list[str] = []
    collect = llama.llama_log_callback(lambda level, text, data: log.append(text.decode()))
    ignore = llama.llama_log_callback(lambda level, text, data: None)
    _callbacks[:] = [collect, ignore]
    llama.llama_log_set(collect, ctypes.c_void_p())
    status = llama.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )
    llama.llama_log_set(ignore, ctypes.c_void_p())
    return status, "".join(log)


def types_of(
    source: Path, mix: str, importance: bool = False, overrides: dict[str, str] | None = None
) -> dict[str, str]:
    """Return the type that llama.cpp would give each tensor of a file, without making any."""
    matrix = {"none": np.ones(1, np.float32)} if importance else None
    target = source.with_suffix(".none")
    status, log = quantize(source, target, mix, matrix, overrides, dry_run=True)
    assert status == 0, log
    names = {ggml_type.name.upper(): ggml_type.name for ggml_type in gguf.GGMLQuantizationType}
    types = {}
    for name, before, after in LINE.findall(log):
        types[name] = names[(after or before).upper()]
    return types


def block_shapes(
    width: int, inner: int, keys: int, experts: int, fused: bool
) -> dict[str, tuple[int, ...]]:
    """Return part → shape of the tensors of one block.

    Args:
        width: The hidden size.
        inner: The intermediate size.
        keys: Rows of attn_k and attn_v.
        experts: Experts of a block; 0 for a dense one.
        fused: Whether queries, keys and values are one tensor, and there is no gate.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_output": (width, width),
    }
    if fused:
        shapes["attn_qkv"] = (width + 2 * keys, width)
    else:
        shapes |= {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)}
    suffix = "_exps" if experts else ""
    stacked = (experts,) if experts else ()
    shapes[f"ffn_up{suffix}"] = (*stacked, inner, width)
    shapes[f"ffn_down{suffix}"] = (*stacked, width, inner)
    if not fused:
        shapes[f"ffn_gate{suffix}"] = (*stacked, inner, width)
    if experts:
        shapes["ffn_gate_inp"] = (experts, width)
    return shapes


def write_without_data(
    path: Path,
    architecture: str = "llama",
    layers: int = 8,
    heads: int = 4,
    kv_heads: int = 4,
    width: int = 256,
    tied: bool = False,
    experts: int = 0,
    fused: bool = False,
    attention_every: int = 1,
) -> Path:
    """Write a 32-bit file with names, shapes and settings, and a hole where the data would be.

    Blocks without attention have a state space, and no feed-forward network if their number is odd.
    """
    inner = width if width % 256 else 512
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (VOCABULARY, width),
        "output_norm": (width,),
    }
    if not tied:
        shapes["output"] = (VOCABULARY, width)
    for layer in range(layers):
        parts = block_shapes(width, inner, width // heads * kv_heads, experts, fused)
        if layer % attention_every:
            kept = ("attn_norm",) if layer % 2 else ("attn_norm", "ffn_")
            parts = {part: shape for part, shape in parts.items() if part.startswith(kept)}
            parts |= {"ssm_in": (2 * width, width), "ssm_conv1d": (width, 4)}
        for part, shape in parts.items():
            shapes[f"blk.{layer}.{part}"] = shape
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_expert_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    size = 0
    for name, shape in shapes.items():
        data_bytes = 4 * int(np.prod(shape))
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), data_bytes)
        size += -(-data_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size + 64)
    return path
