"""The rotary embedding in a GGUF file: settings, and tensors of frequency factors.

Some kinds of scaling for longer contexts are settings, others are factors by which the frequency of
each rotated pair is divided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import RopeScalingType

from quantline.errors import Failure, StageError
from quantline.model.architecture import Architecture
from quantline.model.family import GgufFamily

# YaRN's constants as llama.cpp takes them for granted.
YARN_CONSTANTS = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "mscale": None,
    "mscale_all_dim": None,
}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Attributes:
        settings: Method of gguf's writer → value.
        tensors: Name in the file → float32 [rotary width / 2].
    """

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Scaling:
    """How a config.json scales the rotary embedding.

    Attributes:
        values: The keys of rope_scaling, or of rope_parameters.
        config: The whole config.json.
        arch: Sizes of the model.
        theta: The rotary base.
    """

    values: dict[str, Any]
    config: dict[str, Any]
    arch: Architecture
    theta: float


def rope_of(config: dict[str, Any], arch: Architecture, family: GgufFamily) -> Rope:
    """Read the rotary embedding of a config.json, old or new.

    Old ones have rope_scaling and rope_theta, new ones rope_parameters, which may have one entry
    for layers with a sliding window and one for all others.

    Returns:
        Nothing to write for a model with other positions.

    Raises:
        StageError: unsupported_architecture, for a kind of scaling that llama.cpp does not have.
    """
    if not arch.rotary_dim:
        return Rope({})
    parameters = config.get("rope_parameters") or {}
    windowed = parameters.get("sliding_attention", {})
    full = parameters.get("full_attention", parameters)
    values = config.get("rope_scaling") or full
    theta = float(full.get("rope_theta", arch.rope_theta))
    settings: dict[str, Any] = {
        "add_rope_dimension_count": arch.rotary_dim,
        "add_rope_freq_base": theta,
    }
    if family.local_rope:
        local_theta = windowed.get("rope_theta", config.get("rope_local_base_freq", 1e4))
        settings["add_rope_freq_base_swa"] = float(local_theta)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "su":  # what Phi-3 first called it
        kind = "longrope"
    _check_kind(kind, windowed.get("rope_type", "default"), family)
    try:
        scaled = SCALINGS[kind](Scaling(values, config, arch, theta))
    except KeyError as error:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {error} for the rope scaling {kind} in config.json, found none; fetch the "
            "checkpoint again",
        ) from None
    return Rope(settings | scaled.settings, scaled.tensors)


def _check_kind(kind: str, windowed_kind: str, family: GgufFamily) -> None:
    """Refuse kinds of scaling that llama.cpp does not have, of all layers or of windowed ones."""
    missing = {"longrope": not family.longrope, "llama3": not family.rope_factors}
    known = [name for name in SCALINGS if not missing.get(name)]
    if kind in known and windowed_kind == "default":
        return
    found = kind if windowed_kind == "default" else windowed_kind
    raise StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected rope scaling among {', '.join(known)} as llama.cpp's {family.name} has it, "
        f"found {found!r}; choose another format",
    )


def _default(scaling: Scaling) -> Rope:
    """Return no scaling."""
    return Rope({})


def _linear(scaling: Scaling) -> Rope:
    """Divide all frequencies by one factor."""
    return Rope(
        {
            "add_rope_scaling_type": RopeScalingType.LINEAR,
            "add_rope_scaling_factor": float(scaling.values["factor"]),
        }
    )


def _llama3(scaling: Scaling) -> Rope:
    """Scale as Llama 3.1 does.

    Long wavelengths are stretched by a factor, short ones not, and those between in part.
    """
    values = scaling.values
    width = scaling.arch.rotary_dim
    frequencies = scaling.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    wavelengths = 2 * np.pi / frequencies
    low = values["low_freq_factor"]
    high = values["high_freq_factor"]
    factor = values["factor"]
    context = values["original_max_position_embeddings"]
    divisors = np.where(wavelengths > context / low, factor, 1.0)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    smooth = (context / wavelengths[between] - low) / (high - low)
    divisors[between] = 1 / ((1 - smooth) / factor + smooth)
    return Rope({}, {"rope_freqs.weight": divisors.astype(np.float32)})


def _yarn(scaling: Scaling) -> Rope:
    """Scale by YaRN (Peng et al. 2023) as llama.cpp reads it.

    The attention factor can be set; all else is as in the paper.
    """
    values = scaling.values
    other = {
        key: values[key]
        for key, constant in YARN_CONSTANTS.items()
        if values.get(key, constant) != constant
    }
    if other:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected rope scaling yarn as llama.cpp has it, found {other}; choose another format",
        )
    factor = float(values["factor"])
    original_length = values.get("original_max_position_embeddings") or scaling.arch.max_positions
    settings = {
        "add_rope_scaling_type": RopeScalingType.YARN,
        "add_rope_scaling_factor": factor,
        "add_rope_scaling_orig_ctx_len": original_length,
    }
    attention = values.get("attention_factor")
    if attention is not None:  # llama.cpp multiplies by the paper's itself
        settings["add_rope_scaling_attn_factors"] = attention / (1 + 0.1 * math.log(factor))
    return Rope(settings)


def _longrope(scaling: Scaling) -> Rope:
    """Scale by LongRoPE (Ding et al. 2024), as Phi-3 does.

    One set of factors is for contexts up to the original length, another for longer ones.
    """
    values = scaling.values
    original_length = (
        values.get("original_max_position_embeddings")
        or scaling.config["original_max_position_embeddings"]
    )
    stretch = values.get("factor") or scaling.arch.max_positions / original_length
    pairs = scaling.arch.rotary_dim // 2
    tensors = {}
    for kind in ("long", "short"):
        name = f"rope_factors_{kind}.weight"
        tensors[name] = np.array(values[f"{kind}_factor"], np.float32)
        if len(tensors[name]) != pairs:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {pairs} numbers for {name}, found {len(tensors[name])}; fetch the "
                "checkpoint again",
            )
    attention = values.get("attention_factor")
    if attention is None:
        longer = stretch > 1
        attention = math.sqrt(1 + math.log(stretch) / math.log(original_length)) if longer else 1.0
    settings = {
        "add_rope_scaling_orig_ctx_len": original_length,
        "add_rope_scaling_attn_factors": attention,
    }
    return Rope(settings, tensors)


SCALINGS: dict[str, Callable[[Scaling], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
