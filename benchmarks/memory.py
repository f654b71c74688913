"""Peak memory of calibrate and quantize on a model of random weights, and on one twice as deep.

    python -m benchmarks.memory                  # 1.1 GB and 2.1 GB in bfloat16; hours on two cores
    python -m benchmarks.memory --steps calibrate gptq

Each step runs in a process of its own. Writes benchmarks/results/memory.json and prints the table:
the peak of the whole resident memory and of its anonymous part (what is no page of a file), less
what the imports alone take, as multiples of one block's float32 weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.paths import RESULTS
from benchmarks.random_models import NARROW, block_mib, write_narrow_llama
from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.files import MIB, folder_bytes, read_json, write_json
from quantline.model.checkpoint import Checkpoint

SEQUENCES = 8
LENGTH = 128
STEPS = ("calibrate", "gptq", "awq", "gptq+curvature")
# What calibrating and quantizing import: a process that does nothing else is their baseline.
CALIBRATE_MODULES = ("benchmarks.calibration", "quantline.calibration.output_moments")
QUANTIZE_MODULES = (
    "quantline.methods.integer.awq",
    "quantline.methods.integer.curvature",
    "quantline.methods.integer.gptq",
    "quantline.recipes.input_scaling",
    "quantline.recipes.layerwise",
    "quantline.recipes.quantize",
)
IMPORTS = "imports of "  # with a step after it: the baseline of that step
# Name in the results → field of /proc/<pid>/status.
MEMORY_FIELDS = {"resident": "VmHWM", "anonymous": "RssAnon"}
POLL_SECONDS = 0.02
TITLES = (
    "blocks",
    "step",
    "peak resident MiB",
    "in blocks",
    "anonymous MiB",
    "in blocks",
    "seconds",
)

Row = dict[str, Any]


def run_step(name: str, folder: Path) -> None:
    """Run what is measured, in the process that is watched.

    Args:
        name: One of STEPS, or IMPORTS and a step, which only imports what that step does.
        folder: Holds `model`; the step writes beside it.
    """
    step = name.removeprefix(IMPORTS)
    modules = CALIBRATE_MODULES if step == "calibrate" else QUANTIZE_MODULES
    for module in modules:
        import_module(module)
    if name != step:
        return
    if step == "calibrate":
        run_calibrate(folder)
    else:
        run_quantize(step, folder)


def run_calibrate(folder: Path) -> None:
    """Calibrate the model in a folder on random tokens."""
    from benchmarks.calibration import calibrate

    draw = np.random.default_rng(1)
    tokens = draw.integers(0, NARROW["vocab_size"], (SEQUENCES, LENGTH)).astype(np.int32)
    calibrate(Checkpoint(folder / "model"), tokens, folder / "calibration", gradients=True)


def run_quantize(step: str, folder: Path) -> None:
    """Quantize the model in a folder.

    Args:
        step: The method, with `+curvature` where the recipe has it.
        folder: Holds `model` and `calibration`.
    """
    from quantline.recipes.quantize import quantize_model

    method, _, curvature = step.partition("+")
    options = {
        "method": method,
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "curvature": bool(curvature),
    }
    into = folder / step
    into.mkdir()
    store = CalibrationStore(folder / "calibration")
    quantize_model(step, parse_recipe(options), Checkpoint(folder / "model"), store, into)


def watch_step(name: str, folder: Path) -> dict[str, float]:
    """Run a step in a process of its own.

    Returns:
        The peaks of its memory in MiB, `resident` and `anonymous`, and its seconds.

    Raises:
        SystemExit: If it fails.
    """
    return watch_process("benchmarks.memory", name, folder)


def watch_process(module: str, name: str, folder: Path) -> dict[str, float]:
    """Run a module with the options --step and --folder; returns and raises as `watch_step`."""
    command = [sys.executable, "-m", module, "--step", name, "--folder", str(folder)]
    peaks = dict.fromkeys(MEMORY_FIELDS, 0.0)
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"})
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines())
        for key, field in MEMORY_FIELDS.items():
            if field in fields:
                kib = int(fields[field].split()[0])
                peaks[key] = max(peaks[key], kib / 1024)
        time.sleep(POLL_SECONDS)
    if process.wait():
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return peaks | {"seconds": time.perf_counter() - started}


def measure_depth(blocks: int, steps: list[str]) -> list[Row]:
    """Measure a model of so many blocks.

    Returns:
        A row for each step, and one with the size of the statistics on disk.
    """
    unit = block_mib(NARROW)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_narrow_llama(folder / "model", blocks)
        model_mib = (folder / "model/model.safetensors").stat().st_size / MIB
        about = {"blocks": blocks, "model_mib": model_mib}
        for step in steps:
            imports = watch_step(IMPORTS + step, folder)
            peaks = watch_step(step, folder)
            over = {key: (peaks[key] - imports[key]) / unit for key in MEMORY_FIELDS}
            rows.append({**about, "step": step, **peaks, "over_imports_in_blocks": over})
        sizes = {}
        for kind in ("inputs", "outputs"):
            sizes[kind] = folder_bytes(folder / "calibration", f"{kind}-*") / MIB
        rows.append({**about, "step": "size", **sizes})
    return rows


def print_results(rows: list[Row], console: Console) -> None:
    """Print the table of what `measure_depth` returned, and the size of the statistics."""
    table = Table(*TITLES, box=None)
    sizes = []
    for row in rows:
        if row["step"] == "size":
            shares = [
                f"{kind} {row[kind] / row['model_mib']:.2f}" for kind in ("inputs", "outputs")
            ]
            sizes.append(f"blocks {row['blocks']}, statistics over the model: {', '.join(shares)}")
            continue
        over = row["over_imports_in_blocks"]
        table.add_row(
            str(row["blocks"]),
            row["step"],
            f"{row['resident']:.0f}",
            f"{over['resident']:.2f}",
            f"{row['anonymous']:.0f}",
            f"{over['anonymous']:.2f}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    for line in sizes:
        console.print(line, highlight=False)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[40, 80])
    parser.add_argument(
        "--steps",
        nargs="+",
        default=list(STEPS),
        choices=STEPS,
        help="calibrate has to be among them",
    )
    parser.add_argument("--step", help="run this step in this process, and nothing else")
    parser.add_argument("--folder", type=Path, help="where that step finds its model")
    return parser.parse_args()


def main() -> None:
    """Measure every depth. Rows of the results that are not measured again stay."""
    options = parse_options()
    if options.step:
        run_step(options.step, options.folder)
        return
    path = RESULTS / "memory.json"
    rows: list[Row] = read_json(path)["rows"] if path.is_file() else []
    measured: list[Row] = []
    for blocks in options.blocks:
        replaced = {*options.steps, "size"}
        rows = [row for row in rows if row["blocks"] != blocks or row["step"] not in replaced]
        new = measure_depth(blocks, options.steps)
        rows += new
        measured += new
        write_json(path, {"block_mib": block_mib(NARROW), "rows": rows})
    print_results(measured, Console())


if __name__ == "__main__":
    main()
