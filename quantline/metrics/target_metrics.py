"""Whether a target gates on and ranks by figures that there can be."""

import difflib
import json
from pathlib import Path
from typing import Any

from quantline.causes import raise_if_of_machine
from quantline.config.params import Params
from quantline.errors import ConfigError
from quantline.metrics.figure import FIGURES

GOLD = "gold_"
# In metrics/<variant>.json and .speed.json beside the registered figures.
OTHERS = ("experts", "gold_items", "gold_lost", "gold_won", "tokens")
DELTA = "_delta"
ENDINGS = ("", DELTA, "_se")


def check_metrics(params: Params) -> None:
    """Check the names of the figures of a target.

    Raises:
        ConfigError: With each name that no figure has, and what was probably meant, and each gate
            on a difference that is not measured. Without a gold set, or with one that cannot be
            read yet, any task of it may be named.
    """
    target = params.target
    named = {f"target.gates.{index}.metric": gate.metric for index, gate in enumerate(target.gates)}
    named["target.optimize.metric"] = target.optimize.metric
    tasks = _tasks(params.evaluation.gold)
    known = [*FIGURES, *OTHERS, *(GOLD + task for task in tasks or [])]
    problems = []
    for key, metric in named.items():
        if any(metric.removesuffix(ending) in known for ending in ENDINGS):
            continue
        if metric.startswith(GOLD) and tasks is None:
            continue
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        problems.append(f"{key}: unknown figure {metric!r}{hint}; there are {', '.join(known)}")
    for index, gate in enumerate(target.gates):
        if gate.on == "delta" and not has_delta(gate.metric):
            compared = [key.removesuffix(DELTA) for key in FIGURES if key.endswith(DELTA)]
            problems.append(
                f"target.gates.{index}.on: expected value, for {gate.metric} has no figure of the "
                f"unquantized model beside it, found delta; delta goes with {', '.join(compared)} "
                "and the tasks of the gold set"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def has_delta(metric: str) -> bool:
    """Whether the unquantized model has that figure too, so that there is a difference to it."""
    if metric in FIGURES:
        return metric + DELTA in FIGURES
    return metric.startswith(GOLD)  # the accuracy of a task


def _tasks(gold: str | None) -> list[str] | None:
    """Return the tasks of a gold set; None if there is none, or it cannot be read."""
    tasks = set()
    items = 0
    try:
        for line in Path(gold or "").read_text(encoding="utf-8").splitlines():
            item: Any = json.loads(line) if line.strip() else {}
            items += bool(item)
            if item.get("task") is not None:
                tasks.add(str(item["task"]))
    except (AttributeError, OSError, ValueError) as error:
        raise_if_of_machine(error)
        return None
    return sorted(tasks) if items else None
