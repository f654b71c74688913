"""Experiments, results and pages of sweeps that nothing was run for."""

import subprocess
from pathlib import Path
from typing import Any

from quantline.sweeps.grid_report import GridReport
from quantline.sweeps.plan import Plan, make_plan
from quantline.sweeps.results import Result
from quantline.sweeps.space import read_space
from tests.helpers.project import ROOT
from tests.helpers.report import TARGET, failed_row, make_row

AXES = {"recipes.gptq.bits": ["3", "4"], "recipes.gptq.group_size": ["32", "128"]}
IDENTITY = ["-c", "user.name=nobody", "-c", "user.email=nobody@nowhere"]


def git(root: Path, *arguments: str) -> str:
    """Run git in a folder, and return what it prints."""
    command = ["git", *IDENTITY, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def begin_git(root: Path) -> None:
    """Make a repository with a commit of all that is there."""
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "-m", "start")


def small_plan(*overrides: str) -> Plan:
    """Return the plan of a sweep over the repository's own conf/."""
    space = read_space(["suite=quick", *(overrides or ["recipes.gptq.bits=2,3,4"])])
    return make_plan(space, space.choices(), ROOT)


def make_result(bits: str, group: str, kld: float, **fields: Any) -> Result:
    """Return the result of an experiment with GPTQ."""
    name = f"gptq-bits{bits}-group_size{group}"
    row = make_row(name, float(bits), kld, **fields)
    row.metrics["bits_per_weight"] = float(bits) + 16 / float(group)
    choice = dict(zip(AXES, (bits, group), strict=True))
    overrides = [f"recipes.gptq-w4g128.bits={bits}", f"recipes.gptq-w4g128.group_size={group}"]
    return Result(row, "gptq-w4g128", "gptq", choice, overrides, name, "ab" * 20)


def grid_report(**fields: Any) -> GridReport:
    """Return the page of four experiments, one of which failed, beside one of the project's."""
    failed = make_result("4", "128", 0.1)
    name = failed.row.variant
    failed.row = failed_row("expected a Hessian that can be <b>inverted</b>")
    failed.row.variant = name
    results = [
        make_result("4", "32", 0.004, pareto=True),
        make_result("3", "32", 0.03, pareto=True),
        make_result("3", "128", 0.05, pareto=True),
        Result(make_row("gguf-q4_k_m", 4.2, 0.006), "gguf-q4_k_m", "kquant", {}),
        failed,
    ]
    values: dict[str, Any] = {
        "name": "gptq-bits-group_size",
        "model": "demo",
        "axes": AXES,
        "results": results,
        "target": TARGET.model_dump(mode="json"),
        "pick": "gptq-bits3-group_size32",
        "reasons": ["smallest of 4 that meet the target"],
        "command": "quantline sweep recipes.gptq.bits=3,4 recipes.gptq.group_size=32,128",
        "commit": "c" * 40,
    }
    return GridReport(**(values | fields))
