"""The rotary embedding that a GGUF file describes, in the words of config.json.

Settings and tensors are those of llama.cpp (llama_model::load_hparams); the kinds are those of
transformers' modeling_rope_utils.
"""

import math
from typing import Any

import numpy as np

from quantline.ingest.dequantize.gguf.file import GgufFile

FREQUENCIES = "rope_freqs.weight"
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
# Suffixes of metadata that are read here.
READ = frozenset(
    {
        *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.attn_factor", "rope.scaling.finetuned"),
    }
)
LOCAL_THETA = 10000.0  # of layers with a window, where a file does not say
LLAMA3_LOW_FACTOR = 1.0
TOLERANCE = 1e-5


def rope_parameters(file: GgufFile, head_dim: int, windowed: bool) -> dict[str, Any]:
    """Return `rope_parameters` of config.json.

    Args:
        file: The file.
        head_dim: Width of a head.
        windowed: Whether layers with a window have parameters of their own.
    """
    theta = float(file.setting("rope.freq_base") or 10000.0)
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    width = file.setting("rope.dimension_count") or head_dim
    if width != head_dim:
        full["partial_rotary_factor"] = width / head_dim
    full |= _scaling(file, theta, width)
    if not windowed:
        return full
    local_theta = file.setting("rope.freq_base_swa") or LOCAL_THETA
    local = {"rope_type": "default", "rope_theta": float(local_theta)}
    return {"full_attention": full, "sliding_attention": local}


def _scaling(file: GgufFile, theta: float, width: int) -> dict[str, Any]:
    """Return what stretches the positions."""
    if FREQUENCIES in file.tensors:
        return _from_divisors(file.read(FREQUENCIES).astype(np.float64), theta, width, file)
    kind = file.setting("rope.scaling.type") or "none"
    factor = file.setting("rope.scaling.factor") or file.setting("rope.scale_linear") or 1.0
    original = file.setting("rope.scaling.original_context_length")
    attention = file.setting("rope.scaling.attn_factor") or 1.0
    if set(FACTORS.values()) <= set(file.tensors):
        return _longrope(file, original, attention)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        found = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(original),
        }
        if attention != 1.0:
            found["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
        return found
    raise file.refusal("rope scaling none, linear, yarn or longrope", f"{kind} of {factor}")


def _longrope(file: GgufFile, original: Any, attention: float) -> dict[str, Any]:
    """Return LongRoPE's factors, one set for short and one for long contexts."""
    length = file.setting("context_length")
    original = int(original or length)
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": attention,
        "factor": length / original,
    }
    for key, name in FACTORS.items():
        found[key] = [float(str(value)) for value in file.read(name)]
    return found


def _from_divisors(
    divisors: np.ndarray, theta: float, width: int, file: GgufFile
) -> dict[str, Any]:
    """Return what divides each frequency: Llama 3's formula if it is that, else the divisors.

    The formula's lengths are known up to a common factor only; Llama 3's own low factor settles it.
    """
    length = int(file.setting("context_length"))
    stretch = float(divisors.max())
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    turns = frequencies / (2 * np.pi)  # per token
    between = (divisors > 1 + TOLERANCE) & (divisors < stretch - TOLERANCE)
    if stretch <= 1 + TOLERANCE and divisors.min() > 1 - TOLERANCE:
        return {}
    if between.sum() >= 2:
        smooth = (1 / divisors[between] - 1 / stretch) / (1 - 1 / stretch)
        slope, offset = np.polyfit(turns[between], smooth, 1)
        distance = -LLAMA3_LOW_FACTOR / offset
        found = {
            "rope_type": "llama3",
            "factor": round(stretch, 4),
            "low_freq_factor": LLAMA3_LOW_FACTOR,
            "high_freq_factor": round(LLAMA3_LOW_FACTOR + distance, 4),
            "original_max_position_embeddings": round(slope * distance),
        }
        if offset < 0 and np.allclose(_llama3_divisors(found, turns), divisors, rtol=TOLERANCE):
            return found
    values = [float(str(np.float32(value))) for value in divisors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": length,
    }


def _llama3_divisors(parameters: dict[str, Any], turns: np.ndarray) -> np.ndarray:
    """Return by what Llama 3.1's formula divides frequencies, given in turns per token."""
    factor = parameters["factor"]
    low = parameters["low_freq_factor"]
    high = parameters["high_freq_factor"]
    rotations = turns * parameters["original_max_position_embeddings"]
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
