"""Speed on hardware that is not here: what its memory lets through.

It is the roofline model (Williams, Waterman and Patterson, CACM 52, 2009). Decoding one sequence
reads every weight once for each token, and the keys and values of all tokens before it, and does
little with either; so the bandwidth of the memory bounds it from above. It is an estimate, never
mixed with what was measured: it has a name of its own, `estimated_decode_tok_s`, and carries its
formula.
"""

import re
from typing import Any

from quantline.config.runtimes import RUNTIMES
from quantline.config.targets import Target
from quantline.files import MIB
from quantline.model.architecture import Architecture
from quantline.report.memory import NO_MODEL, kv_cache_bytes


def bytes_read(tensors: dict[str, dict[str, Any]], arch: Architecture) -> float:
    """Return the bytes of weights that one token needs.

    Of an embedding that is one row, unless it is the head too; of experts as many as a token is
    sent to; of everything else all.

    Args:
        tensors: Of a manifest: name → {weights, bytes, …}.
        arch: Of the model.
    """
    looked_up = set()
    for part in ("token_embd", "position_embd"):
        if part in arch.family.outside:
            looked_up.add(f"{arch.family.outside[part]}.weight")
    looked_up.discard(arch.head)
    total = 0.0
    for name, tensor in tensors.items():
        share = 1.0
        if name in looked_up:
            share = arch.hidden_size / tensor["weights"]
        elif re.search(r"\.experts\.\d+\.", name):
            share = arch.experts_used / arch.experts
        total += share * tensor["bytes"]
    return total


def estimate_decoding(
    tensors: dict[str, dict[str, Any]], runtime: str, target: Target, arch: Architecture | None
) -> dict[str, Any]:
    """Return how fast the target's hardware decodes one sequence at most.

    Args:
        tensors: Of the manifest.
        runtime: Where the variant is served; its KV cache is read too.
        target: Describes the hardware and the context.
        arch: Of the model; None if its config.json is not there.

    Returns:
        {decode_tok_s, hardware, provenance, formula}, `decode_tok_s` None without `arch`; {} for a
        target that describes no hardware.
    """
    if target.hardware is None:
        return {}
    estimate = {"hardware": target.hardware.name, "provenance": "estimated"}
    if arch is None:
        return estimate | {"decode_tok_s": None, "formula": NO_MODEL}
    weights = bytes_read(tensors, arch)
    cache = 0
    if target.context is not None:
        cache = kv_cache_bytes(arch, target.context, RUNTIMES[runtime].kv_bytes)
    bandwidth = target.hardware.bandwidth_gb_s
    speed = bandwidth * 1e9 / (weights + cache)
    experts = f", {arch.experts_used} of {arch.experts} experts," if arch.experts else ""
    context = " and no KV cache"
    if cache:
        context = f" + {cache / MIB:.1f} MiB of KV cache at {target.context} tokens"
    formula = (
        f"{bandwidth:g} GB/s ÷ ({weights / MIB:.1f} MiB of weights{experts} as stored{context}) = "
        f"at most {speed:,.0f} tokens/s"
    )
    return estimate | {"decode_tok_s": speed, "formula": formula}
