"""Our figures over those of other tools, from the rows of benchmarks.quality."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

AVERAGED = ("kld", "se", "seconds", "cpu_seconds")
TIMES = ("seconds", "cpu_seconds")
SWEEP = ("gptq", "awq")  # of our variants, which share one calibration
PEER_SWEEP = ("llmcompressor gptq", "llmcompressor awq")
AUTOROUND = "autoround autoround"

Row = dict[str, Any]
Ratios = Iterator[tuple[str, float]]


class Grid(NamedTuple):
    """Bits of a weight, and how many weights share a scale."""

    bits: int
    group_size: int

    @classmethod
    def of(cls, row: Row) -> "Grid":
        """Return the grid of a row."""
        return cls(row["bits"], row["group_size"])

    def __str__(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}"


def average_draws(rows: list[Row]) -> list[Row]:
    """Return one row of each grid and recipe, with means over the draws that did not fail.

    With several draws, the standard error of the divergence is that of its mean over the draws.
    """
    groups: dict[tuple[Grid, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((Grid.of(row), row["who"]), []).append(row)
    averaged = []
    for group in groups.values():
        finished = [row for row in group if "kld" in row]
        mean = dict(group[0])
        if finished:
            for key in AVERAGED:
                mean[key] = float(np.mean([row[key] for row in finished]))
            mean["texts"] = {
                text: {
                    key: float(np.mean([row["texts"][text][key] for row in finished]))
                    for key in ("kld", "se")
                }
                for text in finished[0]["texts"]
            }
        if len(finished) > 1:
            spread = np.std([row["kld"] for row in finished], ddof=1)
            mean["se"] = float(spread / len(finished) ** 0.5)
        averaged.append(mean)
    return averaged


def compare_with_peers(rows: list[Row], calibration: dict[str, float]) -> Ratios:
    """Yield what is compared, and our figure over the other tool's.

    Divergences are compared on each grid, and times for one variant and for a sweep of several.

    Args:
        rows: What `average_draws` returned.
        calibration: Our calibration's seconds.
    """
    for grid in sorted({Grid.of(row) for row in rows}, reverse=True):
        finished = {}
        for row in rows:
            if Grid.of(row) == grid and "kld" in row:
                finished[row["who"]] = row
        yield from _compare_grid(grid, finished, calibration)
    for kind in TIMES:
        theirs = [row[kind] for row in rows if row["who"] in PEER_SWEEP and "kld" in row]
        ours = [row[kind] for row in rows if row["who"] in SWEEP]
        if theirs and len(ours) == len(theirs):
            label = f"{kind} of a sweep of {len(ours)} variants over llmcompressor"
            yield label, (calibration[kind] + sum(ours)) / sum(theirs)


def _compare_grid(grid: Grid, rows: dict[str, Row], calibration: dict[str, float]) -> Ratios:
    """Yield the ratios of one grid, from its rows by recipe or tool."""
    curvature = [name for name in rows if name.endswith("curvature")]
    best = min(curvature, key=lambda name: rows[name]["kld"], default=None)
    pairs = (
        ("gptq", "llmcompressor gptq"),
        ("awq", "llmcompressor awq"),
        ("gptq symmetric", "gptqmodel gptq"),
        (best, AUTOROUND),
    )
    for ours, theirs in pairs:
        if ours in rows and theirs in rows:
            label = f"divergence at {grid}: {ours} over {theirs}"
            yield label, rows[ours]["kld"] / rows[theirs]["kld"]
    for kind in TIMES:
        if best is not None and AUTOROUND in rows:
            theirs = rows[AUTOROUND][kind]
            ours = rows[best][kind]
            yield f"{kind} at {grid}: {best} over autoround", ours / theirs
            label = f"{kind} at {grid}: {best} with its calibration over autoround"
            yield label, (calibration[kind] + ours) / theirs
        peers = [
            rows[name][kind] for name in ("llmcompressor gptq", "gptqmodel gptq") if name in rows
        ]
        if peers and "gptq" in rows:
            label = f"{kind} at {grid}: gptq with its calibration over the fastest peer"
            yield label, (calibration[kind] + rows["gptq"][kind]) / min(peers)
