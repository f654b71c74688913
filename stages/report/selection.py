"""From figures to a decision: the Pareto front, and the variant to ship for a target."""

import math

from stages.config import Target
from stages.report.gates import CANNOT_TELL

MIB = 2**20


def on_front(rows: list[dict]) -> set[str]:
    """Variants that no other beats in both size and KL divergence."""
    points = [(row["variant"], row["metrics"]["size_bytes"], row["metrics"]["mean_kld"]) for row in rows]
    return {name for name, size, kld in points
            if not any(s <= size and k <= kld and (s < size or k < kld) for _, s, k in points)}


def objections(row: dict, target: Target) -> list[str]:
    """Why a variant cannot be shipped for the target; empty if it can."""
    if row["status"] != "ok":
        return [f"failed: {row['failure']}"]
    found = []
    if row["format"] not in target.formats:
        found.append(f"format {row['format']} is not among {', '.join(target.formats)}")
    if row["runtime"] not in target.runtimes:
        found.append(f"runtime {row['runtime']} is not among {', '.join(target.runtimes)}")
    size, memory = row["metrics"]["size_bytes"] / MIB, row["speed"].get("peak_rss_mib")
    if target.max_size_mib is not None and not size <= target.max_size_mib:
        found.append(f"{size:.1f} MiB is over the limit of {target.max_size_mib:g} MiB")
    if target.max_memory_mib is not None and not (memory is not None and memory <= target.max_memory_mib):
        found.append(f"peak memory {memory if memory is None else round(memory)} MiB is over the limit of "
                     f"{target.max_memory_mib:g} MiB")
    for gate in row["gates"]:
        if gate["required"] and not gate["passed"]:
            found.append(gate["said"])
    return found


def has_gold(rows: list[dict]) -> bool:
    return any("gold_accuracy" in row["metrics"] for row in rows if row["status"] == "ok")


def pick(rows: list[dict], target: Target) -> tuple[str | None, str | None, list[str]]:
    """(the variant to ship or None, the runner-up or None, the reasons).

    Among the variants with no objections the best by `target.optimize`; equals are told apart by KL divergence and
    then by name. Each row's `objections` has to be filled in.
    """
    key, sign = target.optimize.metric, 1 if target.optimize.direction == "min" else -1

    def value(row: dict) -> float:
        return {**row["speed"], **row["metrics"]}.get(key, math.nan)

    able = [row for row in rows if not row["objections"] and not math.isnan(value(row))]
    able.sort(key=lambda row: (sign * value(row), row["metrics"]["mean_kld"], row["variant"]))
    if not able:
        return None, None, [f"no variant meets the target {target.name}; each row says why"]
    best = able[0]
    word = "smallest" if sign > 0 else "largest"
    reasons = [f"of {len(able)} variants that meet the target {target.name}, it has the {word} {key}: "
               f"{_nice(key, value(best))}",
               f"its mean KL divergence from full precision is {best['metrics']['mean_kld']:.4g} "
               f"± {best['metrics']['mean_kld_se']:.2g}"]
    if "gold_accuracy" in best["metrics"]:
        m = best["metrics"]
        reasons.append(f"it answers {m['gold_accuracy']:.1%} of the gold set, {m['gold_accuracy_delta']:+.1%} from full "
                       f"precision ({m['gold_flips']} of {m['gold_items']} answers flip, p = {m['gold_p_value']:.2g})")
    reasons += [gate["said"] for gate in best["gates"] if gate["verdict"] == CANNOT_TELL]
    if len(able) > 1:
        reasons.append(f"runner-up: {able[1]['variant']}, {key} {_nice(key, value(able[1]))}")
    return best["variant"], able[1]["variant"] if len(able) > 1 else None, reasons


def _nice(key: str, value: float) -> str:
    return f"{value / MIB:.1f} MiB" if key == "size_bytes" else f"{value:.4g}"
