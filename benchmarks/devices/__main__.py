"""Our calibration and recipes on a GPU beside the CPU: how far they agree, and what each takes.

    python -m benchmarks.devices                         # the demo model, all recipes
    python -m benchmarks.devices --random 2 --only gptq  # the memory benchmark's Llama, two blocks

Each device computes in a process of its own, and both quantize from the CPU's calibration. Writes
benchmarks/results/devices-<model>.json and prints the table. Needs a GPU that torch sees.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.calibration import calibrate
from benchmarks.devices.agreement import compare_calibrations, compare_quantized
from benchmarks.model_under_test import ModelUnderTest
from benchmarks.paths import DEMO_DATA, DEMO_MODEL, RESULTS
from benchmarks.quality.our_recipes import our_recipes
from benchmarks.random_models import NARROW, write_narrow_llama
from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.files import MIB, read_json, write_json
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.quantized.store import QuantizedWriter
from quantline.recipes.context import QuantizationContext
from quantline.recipes.quantize import quantize_model
from quantline.recipes.quantize_block import quantize_block

RECIPES: dict[str, dict[str, Any]] = our_recipes(4, 128)
RECIPES |= {name: {"method": name} for name in ("smoothquant", "int8", "fp8")}
LENGTH = 256  # tokens of a sequence
TITLES = ("", "alike %", "error over CPU", "KL CPU", "GPU", "s CPU", "GPU", "GPU MiB")


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a call, and on a GPU the most memory that tensors took there."""
    on_gpu = device().type == "cuda"
    started = time.perf_counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run()
    costs = {"seconds": time.perf_counter() - started}
    if on_gpu:
        costs["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / MIB
    return costs


def compute(
    model: Path, tokens: np.ndarray, folder: Path, calibration: Path, names: list[str]
) -> dict[str, Any]:
    """Calibrate and quantize on the device of this process.

    What is loaded or compiled once is no part of the measured time.

    Args:
        model: The checkpoint.
        tokens: To calibrate on, int32 [sequences, length].
        folder: Where the calibration and the quantized models are written.
        calibration: The one to quantize from.
        names: Of the recipes.

    Returns:
        {device, torch: its version, took: what calibrating and each recipe took}.
    """
    checkpoint = Checkpoint(model)

    def collect() -> None:
        calibrate(checkpoint, tokens, folder / "calibration", gradients=True)

    calibrate(checkpoint, tokens[:2], folder / "first", gradients=True)
    took = {"calibrate": measure(collect)}
    store = CalibrationStore(calibration)
    for name in names:
        recipe = parse_recipe(RECIPES[name])
        warm_up = folder / f"{name}, first"
        warm_up.mkdir()
        writer = QuantizedWriter(warm_up)
        quantize_block(QuantizationContext(recipe, checkpoint, checkpoint.arch, store, writer), 0)
        into = folder / name
        into.mkdir()

        def quantize(name: str = name, into: Path = into) -> None:
            recipe = parse_recipe(RECIPES[name])
            quantize_model(name, recipe, checkpoint, CalibrationStore(calibration), into)

        took[name] = measure(quantize)
    on_gpu = device().type == "cuda"
    label = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    return {"device": label, "torch": torch.__version__, "took": took}


def compute_in_process(
    model: Path,
    tokens: np.ndarray,
    folder: Path,
    calibration: Path,
    names: list[str],
    **environment: str,
) -> dict[str, Any]:
    """Call `compute` in a process of its own, with more environment variables."""
    folder.mkdir()
    np.save(folder / "tokens.npy", tokens)
    places = [str(model), str(folder), str(calibration)]
    command = [sys.executable, "-m", "benchmarks.devices", "--compute", *places, "--only", *names]
    subprocess.run(command, check=True, env=os.environ | environment)
    return read_json(folder / "result.json")


def print_results(
    console: Console, rows: dict[str, dict[str, Any]], cpu: dict[str, Any], gpu: dict[str, Any]
) -> None:
    """Print what agrees and what it took.

    Args:
        console: Where to.
        rows: calibrate, and each recipe → how far both devices agree.
        cpu: What `compute` returned on the CPU.
        gpu: The same on the GPU.
    """
    console.print(f"{gpu['device']} beside {cpu['device']}, torch {gpu['torch']}", highlight=False)
    table = Table(*TITLES, box=None)
    for name, row in rows.items():
        agreement = ["", ""]
        if "alike" in row:
            agreement = [f"{100 * row['alike']:.2f}", f"{row['error_over_cpu']:.5f}"]
        divergences = [f"{value:.6f}" for value in row.get("kld", ())] or ["", ""]
        on_cpu = cpu["took"][name]
        on_gpu = gpu["took"][name]
        table.add_row(
            name,
            *agreement,
            *divergences,
            f"{on_cpu['seconds']:.2f}",
            f"{on_gpu['seconds']:.2f}",
            f"{on_gpu['peak_gpu_mib']:.0f}",
        )
    console.print(table)
    largest = rows["calibrate"]
    console.print(
        f"calibration, largest relative difference of a layer: H {largest['moment']:.1e}, largest "
        f"inputs {largest['peak']:.1e}, G {largest['factors']:.1e}",
        highlight=False,
    )


def compare_devices(
    model: Path, tokens: np.ndarray, names: list[str], bench: ModelUnderTest | None, folder: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """Compute on both devices and compare.

    Args:
        model: The checkpoint.
        tokens: To calibrate on.
        names: Of the recipes.
        bench: The model with its evaluation text, to measure divergences; None for random weights.
        folder: Where to work.

    Returns:
        What `compute` returned on the CPU and on the GPU, and how far they agree, by recipe.
    """
    cpu_folder = folder / "cpu"
    gpu_folder = folder / "gpu"
    calibration = cpu_folder / "calibration"
    # Without a visible GPU torch computes on the CPU.
    cpu = compute_in_process(model, tokens, cpu_folder, calibration, names, CUDA_VISIBLE_DEVICES="")
    gpu = compute_in_process(model, tokens, gpu_folder, calibration, names)
    rows: dict[str, dict[str, Any]] = {
        "calibrate": compare_calibrations(calibration, gpu_folder / "calibration")
    }
    for name in names:
        rows[name] = compare_quantized(cpu_folder / name, gpu_folder / name)
        if bench:
            folders = (cpu_folder / name, gpu_folder / name)
            rows[name]["kld"] = [bench.quantized_divergence(place)["kld"] for place in folders]
    return cpu, gpu, rows


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.devices", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--random", type=int, help="blocks of a Llama of random weights, instead of the demo model"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        nargs=2,
        default=[64, 64],
        help="calibration and evaluation sequences",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(RECIPES),
        choices=list(RECIPES),
        metavar="RECIPE",
        help=", ".join(RECIPES),
    )
    parser.add_argument("--compute", type=Path, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Compare the devices on the demo model or on random weights."""
    options = parse_options()
    if options.compute:
        model, folder, calibration = options.compute
        tokens = np.load(folder / "tokens.npy")
        result = compute(model, tokens, folder, calibration, options.only)
        write_json(folder / "result.json", result)
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "expected a GPU, found none that torch sees; install torch's CUDA build, or look at "
            "nvidia-smi"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = None
        if options.random:
            name = f"random-{options.random}"
            model = folder / "model"
            write_narrow_llama(model, options.random)
            draw = np.random.default_rng(1)
            shape = (options.sequences[0], LENGTH)
            tokens = draw.integers(0, NARROW["vocab_size"], shape).astype(np.int32)
        else:
            model = DEMO_MODEL
            calibration = DEMO_DATA / "calibration.txt"
            evaluation = DEMO_DATA / "evaluation.txt"
            sequences = tuple(options.sequences)
            bench = ModelUnderTest(model, calibration, [evaluation], sequences, LENGTH)
            name = bench.name
            tokens = bench.calibration
        cpu, gpu, rows = compare_devices(model, tokens, options.only, bench, folder)
    print_results(Console(width=120), rows, cpu, gpu)
    results = {"cpu": cpu, "gpu": gpu, "calibration_tokens": int(tokens.size), "rows": rows}
    write_json(RESULTS / f"devices-{name}.json", results)


if __name__ == "__main__":
    main()
