"""Rotary embedding in a GGUF file: settings, and the tensors of frequency factors that some kinds of scaling have."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import RopeScalingType

from quantline.model.architecture import Architecture
from quantline.errors import Failure, StageError

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """`settings`: method of gguf's writer → value. `tensors`: name in the file → float32 [rotary width / 2]."""

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def rope_of(config: dict, facts: Architecture, container: str) -> Rope:
    """The rotary settings of a config.json, old or new (rope_scaling and rope_theta, or rope_parameters); none for a
    model with other positions.

    Raises StageError(unsupported_architecture) for a kind of scaling that llama.cpp does not have.
    """
    given = config.get("rope_parameters") or {}
    local = given.get("sliding_attention", {})
    whole = given.get("full_attention", given)
    scaling = config.get("rope_scaling") or whole
    if not facts.rotary_dim:
        return Rope({})
    theta, width = float(whole.get("rope_theta", facts.rope_theta)), facts.rotary_dim
    settings = {"add_rope_dimension_count": width, "add_rope_freq_base": theta}
    if container == "gemma3":
        settings["add_rope_freq_base_swa"] = float(local.get("rope_theta", config.get("rope_local_base_freq", 1e4)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    local_kind = local.get("rope_type", "default")
    if kind not in KINDS or (kind == "longrope") > (container == "phi3") or local_kind != "default":
        wrong = kind if local_kind == "default" else local_kind
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected rope scaling among {', '.join(KINDS)} as "
                         f"llama.cpp's {container} has it, found {wrong!r}; choose another format")
    try:
        more, tensors = SCALINGS[kind](scaling, config, facts, theta, width)
    except KeyError as error:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE,
                         f"rope scaling {kind} in config.json lacks {error}") from None
    return Rope(settings | more, tensors)


Scaled = tuple[dict[str, Any], dict[str, np.ndarray]]


def _default(scaling: dict, config: dict, facts: Architecture, theta: float, width: int) -> Scaled:
    return {}, {}


def _linear(scaling: dict, config: dict, facts: Architecture, theta: float, width: int) -> Scaled:
    return {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": float(scaling["factor"])}, {}


def _yarn(scaling: dict, config: dict, facts: Architecture, theta: float, width: int) -> Scaled:
    """YaRN (Peng et al. 2023) as llama.cpp reads it: the attention factor can be set, all else is as in the paper."""
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
    other = {key: scaling[key] for key, usual in fixed.items() if scaling.get(key, usual) != usual}
    if other:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected rope scaling yarn as llama.cpp has it, found "
                                                           f"{other}; choose another format")
    factor, before = float(scaling["factor"]), scaling.get("original_max_position_embeddings") or facts.max_positions
    settings = {"add_rope_scaling_type": RopeScalingType.YARN, "add_rope_scaling_factor": factor,
                "add_rope_scaling_orig_ctx_len": before}
    if (given := scaling.get("attention_factor")) is not None:  # llama.cpp multiplies by the paper's itself
        settings["add_rope_scaling_attn_factors"] = given / (1 + 0.1 * math.log(factor))
    return settings, {}


def _llama3(scaling: dict, config: dict, facts: Architecture, theta: float, width: int) -> Scaled:
    """Llama 3.1's: long wavelengths are stretched by a factor, short ones not, and those between in part."""
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    length = 2 * np.pi / frequencies
    low, high, factor = (scaling[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    context = scaling["original_max_position_embeddings"]
    smooth = np.clip((context / length - low) / (high - low), 0, 1)
    return {}, {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def _longrope(scaling: dict, config: dict, facts: Architecture, theta: float, width: int) -> Scaled:
    """LongRoPE (Ding et al. 2024), Phi-3's: factors for contexts up to the original length, and others beyond it."""
    before = scaling.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    stretch = facts.max_positions / before
    usual = math.sqrt(1 + math.log(stretch) / math.log(before)) if stretch > 1 else 1.0
    factors = {f"rope_factors_{kind}.weight": np.array(scaling[f"{kind}_factor"], np.float32)
               for kind in ("long", "short")}
    for name, values in factors.items():
        if len(values) != width // 2:
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE,
                             f"expected {width // 2} numbers for {name}, found {len(values)}")
    attention = scaling.get("attention_factor")
    return {"add_rope_scaling_orig_ctx_len": before,
            "add_rope_scaling_attn_factors": usual if attention is None else attention}, factors


SCALINGS = {"default": _default, "linear": _linear, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}
