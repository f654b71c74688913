"""llama.cpp's own quantize, driven through llama-cpp-python, and files for it that have no data."""

import ctypes
import re
from pathlib import Path

import gguf
import numpy as np


def quantize(source: Path, target: Path, mix: str, importance: dict[str, np.ndarray] | None = None,
             overrides: dict[str, str] | None = None, dry: bool = False) -> tuple[int, str]:
    """(exit status, what was logged). `importance`: name of a tensor → float32 [width] or [matrices, width]."""
    import llama_cpp as llama

    settings, said = llama.llama_model_quantize_default_params(), []
    settings.nthread, settings.dry_run = 1, dry
    settings.ftype = getattr(llama, {"F32": "LLAMA_FTYPE_ALL_F32"}.get(mix, f"LLAMA_FTYPE_MOSTLY_{mix}"))
    if importance is not None:
        flat = {name: np.ascontiguousarray(values, np.float32).reshape(-1) for name, values in importance.items()}
        entries = (llama.llama_model_imatrix_data * (len(flat) + 1))()
        for entry, (name, values) in zip(entries, flat.items(), strict=False):
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    if overrides:
        patterns = (llama.llama_model_tensor_override * (len(overrides) + 1))()
        for one, (pattern, kind) in zip(patterns, overrides.items(), strict=False):
            one.pattern, one.type = pattern.encode(), int(gguf.GGMLQuantizationType[kind])
        settings.tt_overrides = patterns
    log = llama.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(log, ctypes.c_void_p())
    status = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    llama.llama_log_set(quiet, ctypes.c_void_p())
    quantize.kept = quiet  # ctypes does not hold it, and llama.cpp goes on calling it
    return status, "".join(said)


LINE = re.compile(r"\] (\S+) +- \[[^\]]*\], type = +(\w+), size = [^\n(]*(?:\((\w+)\))?\n")


def types(source: Path, mix: str, importance: bool = False, overrides: dict[str, str] | None = None) -> dict[str, str]:
    """The type that llama.cpp would give each tensor of a file, without making any."""
    given = {"none": np.ones(1, np.float32)} if importance else None
    status, said = quantize(source, source.with_suffix(".none"), mix, given, overrides, dry=True)
    assert status == 0, said
    known = {kind.name.upper(): kind.name for kind in gguf.GGMLQuantizationType}
    return {name: known[(after or before).upper()] for name, before, after in LINE.findall(said)}


def hollow(path: Path, architecture: str = "llama", layers: int = 8, heads: int = 4, kv_heads: int = 4, width: int = 256,
           tied: bool = False, experts: int = 0, fused: bool = False) -> Path:
    """A 32-bit file with names, shapes and settings, and a hole where the data would be."""
    inner = width if width % 256 else 512
    shapes = {"token_embd": (512, width), "output_norm": (width,), **({} if tied else {"output": (512, width)})}
    for layer in range(layers):
        keys = width // heads * kv_heads
        parts = {"attn_norm": (width,), "ffn_norm": (width,), "attn_output": (width, width)}
        parts |= ({"attn_qkv": (width + 2 * keys, width)} if fused else
                  {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)})
        more, many = ("_exps", (experts,)) if experts else ("", ())
        parts |= {"ffn_up" + more: (*many, inner, width), "ffn_down" + more: (*many, width, inner)}
        parts |= {} if fused else {"ffn_gate" + more: (*many, inner, width)}
        parts |= {"ffn_gate_inp": (experts, width)} if experts else {}
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
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
    writer.add_vocab_size(512)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for name, shape in shapes.items():
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = sum(-(-4 * int(np.prod(shape)) // 32) * 32 for shape in shapes.values())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size + 64)
    return path
