"""Seconds of load and `quantize none` for a model that has no table, beside one that has.

    python -m benchmarks.load                    # 30 and 60 blocks of SmolLM2-135M's size
    python -m benchmarks.load --model /smollm2   # a Llama of real weights

Both models are one file of weights. One config.json names Llama, which has a table; the other names
SmolLM3, which has none, computes the same here, and whose structure load has to find. The stages
run in turn in processes of their own. The least of several runs counts, since other work on the
machine can only add to it. Writes benchmarks/results/load-<model>.json and prints the table.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.paths import DEMO_DATA, RESULTS, ROOT
from benchmarks.random_models import write_small_llama
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.config.compose import as_yaml, compose, load_params
from quantline.files import read_json, write_json
from quantline.ingest.load import load

STAGES = ("load", "quantize none")
KINDS = ("table", "found")
OVERRIDES = (
    "suite=quick",
    "recipe=[none]",
    "variant=[bf16]",
    "target=any",
    "model=local",
    "calibration=file",
    f"calibration.path={ROOT / DEMO_DATA / 'calibration.txt'}",
    "calibration.part=[0.0,1.0]",
    "calibration.sequences=2",
    "calibration.length=32",
    "calibration.curvature=false",
)
TITLES = ("blocks", "CPU seconds of", "with a table", "found", "ratio", "wall", "found", "ratio")

Row = dict[str, Any]


def write_found(model: Path, folder: Path) -> None:
    """Write the model again under a config.json that names a class without a table.

    SmolLM3 is Llama but for blocks without positions, of which there are none here.
    """
    folder.mkdir()
    for file in model.iterdir():
        os.link(file.resolve(), folder / file.name)
    config = read_json(model / "config.json")
    (folder / "config.json").unlink()
    named = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    positions = {"no_rope_layers": [1] * config["num_hidden_layers"]}
    write_json(folder / "config.json", config | named | positions)


def write_project(folder: Path, model: Path) -> None:
    """Write a project whose model is given."""
    folder.mkdir()
    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "dvc.yaml", folder)
    overrides = (*OVERRIDES, f"model.path={model}")
    (folder / "params.yaml").write_text(as_yaml(compose(overrides, root=folder)))


def run_stage(stage: str, project: Path) -> dict[str, float]:
    """Run a stage in a process of its own; return its seconds of the wall clock and of the CPU."""
    command = [sys.executable, "-m", *f"stages.{stage}".split()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


def run_work(project: Path) -> dict[str, float]:
    """Run what the stage load does, in a process that has all imports; return its seconds."""
    command = [sys.executable, "-m", "benchmarks.load", "--work", str(project)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    seconds, cpu = done.stdout.split()[-2:]
    return {"seconds": float(seconds), "cpu_seconds": float(cpu)}


def print_work(project: Path) -> None:
    """Load a project's model twice, and print the seconds of the second time."""
    os.chdir(project)
    model = load_params().model
    for _ in range(2):
        with tempfile.TemporaryDirectory(dir=project) as folder, stopwatch() as times:
            load(model, Path(folder))
    print(times["seconds"], times["cpu_seconds"])


def measure(model: Path, repetitions: int) -> list[Row]:
    """Measure one model both ways.

    Args:
        model: A folder whose config.json names Llama.
        repetitions: How many times each stage runs.

    Returns:
        A row for each of STAGES, and one for what load does after its imports.
    """
    home = model.parent
    projects = {kind: home / f"project-{kind}" for kind in KINDS}
    models = {"table": model, "found": home / "found"}
    if not models["found"].is_dir():
        write_found(model, models["found"])
    for kind in KINDS:
        if not projects[kind].is_dir():
            write_project(projects[kind], models[kind])
            run_stage("load", projects[kind])
            run_stage("calibrate", projects[kind])
    blocks = read_json(model / "config.json")["num_hidden_layers"]
    rows = []
    for name in (*STAGES, "load, without imports"):
        best: dict[str, dict[str, float]] = {}
        for _ in range(repetitions):
            for kind in KINDS:
                is_stage = name in STAGES
                run = run_stage(name, projects[kind]) if is_stage else run_work(projects[kind])
                least = best.setdefault(kind, run)
                best[kind] = {key: min(run[key], least[key]) for key in run}
        rows.append({"blocks": blocks, "what": name, **best})
    return rows


def print_rows(rows: list[Row], console: Console) -> None:
    """Print the table of what `measure` returned."""
    cells = []
    for row in rows:
        numbers = []
        for key in ("cpu_seconds", "seconds"):
            table, found = (row[kind][key] for kind in KINDS)
            numbers += [f"{table:.2f}", f"{found:.2f}", f"{found / table:.2f}"]
        cells.append([str(row["blocks"]), row["what"], *numbers])
    console.print(number_table(TITLES, cells))


def main() -> None:
    """Measure random models of several depths, or the given model; other depths' results stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Llama, instead of random weights")
    parser.add_argument("--blocks", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--keep", type=Path, help="a folder for the given model's projects, which may be there"
    )
    parser.add_argument(
        "--work", type=Path, help="only load this project's model, and print the seconds"
    )
    options = parser.parse_args()
    if options.work:
        print_work(options.work)
        return
    os.environ["PYTHONPATH"] = str(ROOT)
    name = options.model.resolve().name if options.model else "random"
    path = RESULTS / f"load-{name}.json"
    rows: list[Row] = read_json(path)["rows"] if path.is_file() else []
    for blocks in options.blocks if options.model is None else [None]:
        with tempfile.TemporaryDirectory() as temporary:
            home = options.keep.absolute() if options.keep else Path(temporary)
            model = home / "table"
            if blocks is not None:
                write_small_llama(model, blocks)
            elif not model.is_dir():
                shutil.copytree(options.model, model)
            new = measure(model, options.repetitions)
        rows = [row for row in rows if row["blocks"] != new[0]["blocks"]] + new
        write_json(path, {"rows": rows})
    print_rows(rows, Console(width=120))


if __name__ == "__main__":
    main()
