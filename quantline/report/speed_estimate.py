"""Speed on hardware that is not here: what its memory lets through, as the roofline model has it (Williams, Waterman
and Patterson, CACM 52, 2009).

Decoding one sequence reads every weight once for each token, and the keys and values of all tokens before it, and does
little with either; so the bandwidth of the memory bounds it from above. It is an estimate, never mixed with what was
measured: it has a name of its own, `estimated_decode_tok_s`, and carries its formula.
"""

import re

from quantline.model.architecture import Architecture
from quantline.config.params import Target
from quantline.report.memory import KV_BYTES, MIB, kv_cache_bytes

DECODE = "estimated_decode_tok_s"


def bytes_read(tensors: dict[str, dict], facts: Architecture) -> float:
    """Bytes of weights that one token needs, of a manifest's `tensors`: of an embedding one row, unless it is the head
    too; of experts as many as a token is sent to; of everything else all.
    """
    looked_up = {f"{facts.family.outside[part]}.weight" for part in ("token_embd", "position_embd")
                 if part in facts.family.outside} - {facts.head}
    total = 0.0
    for name, about in tensors.items():
        share = 1.0
        if name in looked_up:
            share = facts.hidden_size / about["weights"]
        elif re.search(r"\.experts\.\d+\.", name):
            share = facts.experts_used / facts.experts
        total += share * about["bytes"]
    return total


def decode(tensors: dict[str, dict], runtime: str, target: Target, facts: Architecture | None) -> dict:
    """{decode_tok_s, hardware, provenance, formula} of one sequence on the target's hardware; {} if it describes none.

    `decode_tok_s` is None if the model's config.json is not there.
    """
    if target.hardware is None:
        return {}
    told = {"hardware": target.hardware.name, "provenance": "estimated"}
    if facts is None:
        return told | {"decode_tok_s": None, "formula": "the model's config.json is not there"}
    weights, cache = bytes_read(tensors, facts), 0
    if target.context is not None:
        cache = kv_cache_bytes(facts, target.context, KV_BYTES[runtime])
    speed = target.hardware.bandwidth_gb_s * 1e9 / (weights + cache)
    experts = f", {facts.experts_used} of {facts.experts} experts," if facts.experts else ""
    context = f" + {cache / MIB:.1f} MiB of KV cache at {target.context} tokens" if cache else " and no KV cache"
    return told | {"decode_tok_s": speed, "formula": (
        f"{target.hardware.bandwidth_gb_s:g} GB/s ÷ ({weights / MIB:.1f} MiB of weights{experts} as stored{context}) = "
        f"at most {speed:,.0f} tokens/s")}
