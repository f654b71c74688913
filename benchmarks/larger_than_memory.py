"""A model larger than memory, through the stages: each gets so much memory and no more.

    python -m benchmarks.larger_than_memory /tmp/large           # 8 GB in bfloat16, with 2 GiB
    python -m benchmarks.larger_than_memory /tmp/large --recipes q4_k_m gptq-w4g128

A Llama of random weights (hidden 2048, feed-forward 5632) goes through a project of its own in the
folder, stage by stage, in a control group of the kernel that has the limit: pages of files count
too, and a process that needs more is killed. A folder that has the model is used again, and a run
that was stopped goes on. Writes benchmarks/results/larger-than-memory.json and prints the table.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.memory_group import MemoryGroup
from benchmarks.paths import DEMO_DATA, RESULTS, ROOT
from benchmarks.random_models import write_wide_llama
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.files import MIB, folder_bytes, read_json_list, write_json

BLOCKS = 88
LENGTH = 128
ROWS = "rows.json"  # of the stages that have run
SEQUENCES = 8
# Recipe → the variant that is made of it.
VARIANTS = {
    "q4_k_m": "gguf-q4_k_m",
    "q4_k_m-curvature": "gguf-q4_k_m-curvature",
    "rtn-w4g128": "rtn-w4g128",
    "gptq-w4g128": "gptq-w4g128",
    "awq-w4g128": "awq-w4g128",
}
TITLES = ("stage", "seconds", "peak of anonymous memory, MiB", "the model's share")


def begin_project(folder: Path, model: Path, recipes: list[str], sequences: int) -> None:
    """Write a project that takes the model through some recipes.

    Args:
        folder: It is made.
        model: Folder of the checkpoint.
        recipes: Names out of VARIANTS.
        sequences: Of calibration and of evaluation.
    """
    folder.mkdir()
    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "dvc.yaml", folder)
    choices = [
        "model=local",
        f"model.path={model}",
        f"recipe=[{','.join(recipes)}]",
        f"variant=[{','.join(VARIANTS[name] for name in recipes)}]",
        "evaluation.gold=null",
        "evaluation.speed.prompt_tokens=16",
        "evaluation.speed.new_tokens=4",
        "evaluation.speed.repetitions=1",
        "evaluation.smoke_tokens=4",
        "target=any",
        "target.gates=[]",
    ]
    for part in ("calibration", "evaluation"):
        choices += [
            f"{part}.path={ROOT / DEMO_DATA / part}.txt",
            f"{part}.sequences={sequences}",
            f"{part}.length={LENGTH}",
        ]
    run([sys.executable, "-m", "quantline.cli", "compose", *choices], folder)


def run(command: list[str], folder: Path, group: MemoryGroup | None = None) -> None:
    """Run a command in a folder, and in a group where one is given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    join = group.join if group else None
    subprocess.run(command, cwd=folder, env=environment, check=True, preexec_fn=join)


def stages_of(recipes: list[str]) -> list[list[str]]:
    """Return the stages in their order, each as its module's name and its instance."""
    stages = [["check"], ["load"], ["answer"], ["calibrate"], ["reference"]]
    for recipe in recipes:
        stages += [
            ["quantize", recipe],
            ["export", VARIANTS[recipe]],
            ["evaluate", VARIANTS[recipe]],
        ]
    return stages


def measure(project: Path, stages: list[list[str]], group: MemoryGroup) -> list[dict[str, Any]]:
    """Run the stages one after another; return a row for each.

    Those that the project has rows of are not run again.
    """
    rows: list[dict[str, Any]] = read_json_list(project / ROWS) if (project / ROWS).exists() else []
    for name, *instance in stages[len(rows) :]:
        with stopwatch() as times, group.watch() as peak:
            run([sys.executable, "-m", f"stages.{name}", *instance], project, group)
        row = {
            "stage": " ".join([name, *instance]),
            "seconds": times["seconds"],
            "anonymous_bytes": peak[0],
        }
        rows.append(row)
        write_json(project / ROWS, rows)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the model and the project; 25 GB")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--limit-mib", type=int, default=2048)
    parser.add_argument("--recipes", nargs="+", choices=sorted(VARIANTS), default=["q4_k_m"])
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    options = parser.parse_args()
    folder = options.folder.resolve()
    model = folder / f"llama-{options.blocks}"
    if not (model / "model.safetensors").exists():
        write_wide_llama(model, options.blocks)
    project = folder / "-".join(["project", str(options.blocks), *options.recipes])
    if not project.exists():
        begin_project(project, model, options.recipes, options.sequences)
    with MemoryGroup(f"quantline-{os.getpid()}", options.limit_mib * MIB) as group:
        rows = measure(project, stages_of(options.recipes), group)
    size = folder_bytes(model)
    results = {
        "model": f"Llama of random weights, {options.blocks} blocks",
        "model_bytes": size,
        "limit_bytes": options.limit_mib * MIB,
        "tokens": options.sequences * LENGTH,
        "rows": rows,
    }
    write_json(RESULTS / "larger-than-memory.json", results)
    cells = [
        [
            row["stage"],
            f"{row['seconds']:.0f}",
            f"{row['anonymous_bytes'] / MIB:.0f}",
            f"{row['anonymous_bytes'] / size:.0%}",
        ]
        for row in rows
    ]
    Console().print(number_table(TITLES, cells))


if __name__ == "__main__":
    main()
