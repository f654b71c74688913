"""The memory that a variant takes while it serves: what was measured, or its size, and the KV cache of a context."""

from pathlib import Path

from quantline.model.architecture import Architecture, from_config
from quantline.model.checkpoint import read_json
from quantline.config.params import Target

MIB = 2**20
KV_BYTES = {"llama.cpp": 2, "transformers": 2, "vllm": 2, "onnxruntime": 4, "onnxruntime-genai": 4}  # of a cached value as each runtime serves by default


def facts_of(model: Path) -> Architecture | None:
    """The architecture of the model in a folder; None if there is none (yet)."""
    return from_config(read_json(model / "config.json")) if (model / "config.json").is_file() else None


def kv_cache_bytes(facts: Architecture, context: int, value_bytes: int) -> int:
    """Keys and values of every layer for one sequence of `context` tokens. A sliding window is not counted off."""
    return 2 * facts.layers * facts.kv_heads * facts.head_dim * value_bytes * context


def memory(row: dict, target: Target, facts: Architecture | None) -> dict:
    """{mib, provenance, formula} of a measured variant; `mib` is None if a part of it is not known.

    Without a context it is the measuring process's peak, which nothing is added to. With one, the KV cache at that
    length is added to that peak, or, where the hardware is not this machine's (`memory: size`), to the size on disk.
    """
    peak, size = row["speed"].get("peak_rss_mib"), row["metrics"]["size_bytes"] / MIB
    base, what = (peak, "measured peak") if target.memory == "measured" else (size, "size on disk")
    provenance = "measured" if target.memory == "measured" and target.context is None else "estimated"
    if base is None:
        return {"mib": None, "provenance": provenance, "formula": f"the {what} is not known"}
    if target.context is None:
        return {"mib": base, "provenance": provenance, "formula": f"{base:.0f} MiB {what}"}
    if facts is None:
        return {"mib": None, "provenance": provenance, "formula": "the model's config.json is not there"}
    width = KV_BYTES[row["runtime"]]
    cache = kv_cache_bytes(facts, target.context, width) / MIB
    return {"mib": base + cache, "provenance": provenance, "formula": (
        f"{base:.1f} MiB {what} + 2 × {facts.layers} layers × {facts.kv_heads} KV heads × {facts.head_dim} wide × "
        f"{width} bytes × {target.context} tokens = {base:.1f} + {cache:.1f} MiB")}
