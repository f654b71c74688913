"""From figures to a decision: the Pareto front, the variant to ship for a target, and why not the others."""

import math

from quantline.config.params import Target
from quantline.report.speed_estimate import DECODE
from quantline.report.gates import CANNOT_TELL

MIB = 2**20
WORDS = {"size_bytes": "size", "memory_mib": "memory", "mean_kld": "mean KL divergence", "gold_accuracy": "gold accuracy",
         "decode_tok_s": "decoding speed in tokens/s", "prefill_tok_s": "prefill speed in tokens/s",
         DECODE: "estimated decoding speed in tokens/s"}  # of figures that a target ranks by


def on_front(rows: list[dict]) -> set[str]:
    """Variants that no other beats in both size and KL divergence."""
    points = [(row["variant"], row["metrics"]["size_bytes"], row["metrics"]["mean_kld"]) for row in rows]
    return {name for name, size, kld in points
            if not any(s <= size and k <= kld and (s < size or k < kld) for _, s, k in points)}


def objections(row: dict, target: Target) -> list[str]:
    """Why a variant by itself cannot be shipped for the target; empty if it can."""
    if row["status"] != "ok":
        return [f"failed: {row['failure']}"]
    found = []
    if row["format"] not in target.formats:
        found.append(f"format {row['format']} is not among {', '.join(target.formats)}")
    if row["runtime"] not in target.runtimes:
        found.append(f"runtime {row['runtime']} is not among {', '.join(target.runtimes)}")
    size, memory = row["metrics"]["size_bytes"] / MIB, row["memory"]["mib"]
    if target.max_size_mib is not None and not size <= target.max_size_mib:
        found.append(f"{size:.1f} MiB is over the limit of {target.max_size_mib:g} MiB")
    if target.max_memory_mib is not None and not (memory is not None and memory <= target.max_memory_mib):
        told = "unknown" if memory is None else f"{memory:.0f} MiB, over the limit of {target.max_memory_mib:g} MiB"
        found.append(f"memory is {told} ({row['memory']['formula']})")
    found += [gate["said"] for gate in row["gates"] if gate["required"] and not gate["passed"]]
    if math.isnan(worth(row, target)):
        found.append(f"{target.optimize.metric}, by which the target ranks, is not measured")
    return found


def object_together(rows: list[dict], target: Target) -> None:
    """Fill in each row's `objections`, those that come from the other rows too."""
    for row in rows:
        row["objections"] = objections(row, target)
    served: dict[str, set[str]] = {}
    for row in rows:
        if not row["objections"]:
            served.setdefault(row["recipe"], set()).add(row["runtime"])
    for row in rows:
        runtimes = served.get(row["recipe"], set())
        if not row["objections"] and len(runtimes) < target.min_runtimes:
            row["objections"].append(f"the recipe {row['recipe']} meets the target in {', '.join(sorted(runtimes))} "
                                     f"alone, which wants {target.min_runtimes} runtimes")


def worth(row: dict, target: Target) -> float:
    """The figure that the target optimizes; NaN if it was not measured."""
    value = {**row["speed"], **row["metrics"], "memory_mib": row["memory"]["mib"],
             DECODE: row["estimated"].get("decode_tok_s")}.get(target.optimize.metric)
    return value if isinstance(value, int | float) else math.nan


def equals(one: float, other: float, target: Target) -> bool:
    """Whether two figures that the target ranks by are too close to tell variants apart."""
    return abs(one - other) <= target.optimize.within * abs(other)


def pick(rows: list[dict], target: Target) -> tuple[str | None, str | None, list[str]]:
    """(the variant to ship or None, the runner-up or None, the reasons).

    Among the variants with no objections the best by `target.optimize`; those within its share of the best figure are told
    apart by KL divergence and then by name. Fills in each row's `objections`, and its `why_not`: what it lost by.
    """
    object_together(rows, target)
    key, sign = target.optimize.metric, 1 if target.optimize.direction == "min" else -1
    able = [row for row in rows if not row["objections"]]
    top = sign * min((sign * worth(row, target) for row in able), default=0)

    def rank(row: dict) -> tuple:
        behind = not equals(worth(row, target), top, target)
        return behind, sign * worth(row, target) * behind, row["metrics"]["mean_kld"], row["variant"]

    able.sort(key=rank)
    for row in rows:
        row["why_not"] = row["objections"] or ([] if row is able[0] else [_lost_by(row, able[0], top, target)])
    if not able:
        return None, None, [f"no variant meets the target {target.name}; each row says why"]
    best, m, what = able[0], able[0]["metrics"], WORDS.get(key, key)
    word = ("smallest" if sign > 0 else "largest") + (f" {what}" if worth(best, target) == top else
                                                      f" {what} to within {target.optimize.within:.1%}")
    reasons = [(f"of {len(able)} variants that meet the target {target.name}, it has the {word}" if len(able) > 1
                else f"no other variant meets the target {target.name}; its {what}")
               + f": {_nice(key, worth(best, target))}"]
    reasons.append(f"its mean KL divergence from full precision is {m['mean_kld']:.4g} ± {m['mean_kld_se']:.2g}")
    if "gold_accuracy" in m:
        reasons.append(f"it answers {m['gold_accuracy']:.1%} of the gold set, {m['gold_accuracy_delta']:+.1%} from "
                       f"full precision ({m['gold_flips']} of {m['gold_items']} answers flip, p = {m['gold_p_value']:.2g})")
    if target.max_memory_mib is not None or target.context is not None:
        known = "unknown" if best["memory"]["mib"] is None else f"{best['memory']['mib']:.0f} MiB"
        reasons.append(f"memory: {known}, {best['memory']['provenance']}: {best['memory']['formula']}")
    if best["estimated"]:
        reasons.append(f"decoding on {best['estimated']['hardware']}, estimated: {best['estimated']['formula']}")
    reasons += [gate["said"] for gate in best["gates"] if gate["verdict"] == CANNOT_TELL]
    if len(able) > 1:
        reasons.append(f"runner-up: {able[1]['variant']}, {what} {_nice(key, worth(able[1], target))}")
    return best["variant"], able[1]["variant"] if len(able) > 1 else None, reasons


def _lost_by(row: dict, best: dict, top: float, target: Target) -> str:
    """By how much a variant that meets the target is behind the pick; `top` is the best figure to rank by."""
    key, mine, its = target.optimize.metric, worth(row, target), worth(best, target)
    what = WORDS.get(key, key)
    if equals(mine, top, target):
        near = "" if mine == its else f" to within {target.optimize.within:.1%}"
        return (f"meets the target; {what} is the pick's{near}, its mean KL divergence {row['metrics']['mean_kld']:.4g} to "
                f"the pick's {best['metrics']['mean_kld']:.4g}")
    more, share = "more" if mine > its else "less", f" ({abs(mine / its - 1):.0%})" if its else ""
    return f"meets the target; {what} {_nice(key, mine)}, {_nice(key, abs(mine - its))}{share} {more} than the pick"


def _nice(key: str, value: float) -> str:
    if key in ("size_bytes", "memory_mib"):
        return f"{value / (MIB if key == 'size_bytes' else 1):.1f} MiB"
    return f"{value:.4g}"
