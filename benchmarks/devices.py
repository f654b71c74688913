"""Our calibration and recipes on a GPU beside the CPU: how far the results agree, and the time and memory of each.

    python -m benchmarks.devices                         # the demo model, all recipes
    python -m benchmarks.devices --random 2 --only gptq  # so many blocks of the memory benchmark's Llama of random weights

Each device computes in a process of its own, and both round by the CPU's calibration. Writes
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

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.quality import Bench, recipes
from benchmarks.rounding import calibrate, round_model
from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.model.device import device
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint, read_json
from quantline.config.recipes import RECIPES
from quantline.recipes.dispatch import round_block
from quantline.recipes.context import Work
from quantline.files import write_json

HERE = Path(__file__).parent
ALL = recipes(4, 128) | {name: {"method": name} for name in ("smoothquant", "int8", "fp8")}


def timed(run: Callable[[], object]) -> dict:
    """Seconds, and on a GPU the most memory that tensors took there."""
    on_gpu, started = device().type == "cuda", time.perf_counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run()
    return {"seconds": time.perf_counter() - started} | ({"peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20} if on_gpu else {})


def compute(model: Path, tokens: np.ndarray, folder: Path, calibration: Path, names: list[str]) -> dict:
    """What the device of this process makes of a model: `folder` has it, and what it took is returned."""
    checkpoint = Checkpoint(model)
    facts = architecture(checkpoint)

    def work(name: str, into: Path) -> Work:
        into.mkdir()
        return Work(RECIPES[ALL[name]["method"]](**ALL[name]), checkpoint, facts, Moments(calibration), QuantizedWriter(into))

    def rounded(name: str) -> None:
        one = work(name, folder / name)
        one.writer.close({"layers": round_model(one)})

    calibrate(checkpoint, tokens[:2], folder / "first", True)  # what is loaded or compiled once counts for nobody
    took = {"calibrate": timed(lambda: calibrate(checkpoint, tokens, folder / "calibration", True))}
    for name in names:
        round_block(work(name, folder / f"{name}, first"), 0)
        took[name] = timed(lambda name=name: rounded(name))
    return {"device": torch.cuda.get_device_name() if device().type == "cuda" else f"{os.cpu_count()} CPU cores",
            "torch": torch.__version__, "took": took}


def elsewhere(model: Path, tokens: np.ndarray, folder: Path, calibration: Path, names: list[str], **environment: str) -> dict:
    """`compute` in a process of its own."""
    folder.mkdir()
    np.save(folder / "tokens.npy", tokens)
    subprocess.run([sys.executable, "-m", "benchmarks.devices", "--compute", str(model), str(folder), str(calibration),
                    "--only", *names], check=True, env=os.environ | environment)
    return read_json(folder / "told.json")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """|other - one| / |one| of all values together."""
    return float(np.linalg.norm(other.astype(np.float64) - one) / np.linalg.norm(one.astype(np.float64)))


def compared(cpu: Path, gpu: Path, names: list[str]) -> dict[str, dict]:
    """How far what lies in two folders agrees."""
    first, second = Moments(cpu / "calibration"), Moments(gpu / "calibration")
    found = {"calibrate": {what: max(difference(getattr(first, what)(name), getattr(second, what)(name)) for name in first.layers)
                           for what in ("moment", "peak", "factors")}}
    for name in names:
        one, other = Quantized(cpu / name), Quantized(gpu / name)
        alike = [next(iter(one.linear(layer).parts().values())) == next(iter(other.linear(layer).parts().values()))
                 for layer in one.linears]
        errors = [sum(layer["error"] for layer in whole.report["layers"].values()) for whole in (one, other)]
        found[name] = {"alike": float(sum(map(np.sum, alike)) / sum(part.size for part in alike)),
                       "error_over_cpu": errors[1] / errors[0]}
    return found


def show(console: Console, rows: dict[str, dict], cpu: dict, gpu: dict) -> None:
    """The table of what agrees and what it took."""
    console.print(f"{gpu['device']} beside {cpu['device']}, torch {gpu['torch']}", highlight=False)
    table = Table("", "alike %", "error over CPU", "KL CPU", "GPU", "s CPU", "GPU", "GPU MiB", box=None)
    for name, row in rows.items():
        one, other = cpu["took"][name], gpu["took"][name]
        agree = [f"{100 * row['alike']:.2f}", f"{row['error_over_cpu']:.5f}"] if "alike" in row else ["", ""]
        table.add_row(name, *agree, *(f"{one:.6f}" for one in row.get("kld", ())) if "kld" in row else ("", ""),
                      f"{one['seconds']:.2f}", f"{other['seconds']:.2f}", f"{other['peak_gpu_mib']:.0f}")
    console.print(table)
    told = rows["calibrate"]
    console.print(f"calibration, largest relative difference of a layer: H {told['moment']:.1e}, largest inputs {told['peak']:.1e}, "
                  f"G {told['factors']:.1e}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, help="blocks of a Llama of random weights, instead of the demo model")
    parser.add_argument("--sequences", type=int, nargs=2, default=[64, 64], help="calibration and evaluation sequences")
    parser.add_argument("--only", nargs="+", default=list(ALL), choices=list(ALL), metavar="RECIPE", help=", ".join(ALL))
    parser.add_argument("--compute", type=Path, nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.compute:
        model, folder, calibration = asked.compute
        write_json(folder / "told.json", compute(model, np.load(folder / "tokens.npy"), folder, calibration, asked.only))
        return
    if not torch.cuda.is_available():
        raise SystemExit("expected a GPU, found none that torch sees; install torch's CUDA build, or look at nvidia-smi")
    with tempfile.TemporaryDirectory() as place:
        work, bench = Path(place), None
        if asked.random:
            model, name = work / "model", f"random-{asked.random}"
            memory.make(model, asked.random)
            tokens = np.random.default_rng(1).integers(0, memory.SIZES["vocab_size"], (asked.sequences[0], 256)).astype(np.int32)
        else:
            model = Path("demo/model")
            bench = Bench(model, Path("demo/data/calibration.txt"), Path("demo/data/evaluation.txt"), tuple(asked.sequences), 256)
            tokens, name = bench.calibration, bench.name
        cpu = elsewhere(model, tokens, work / "cpu", work / "cpu/calibration", asked.only, CUDA_VISIBLE_DEVICES="")
        gpu = elsewhere(model, tokens, work / "gpu", work / "cpu/calibration", asked.only)
        rows = compared(work / "cpu", work / "gpu", asked.only)
        for one in asked.only if bench else ():
            rows[one]["kld"] = [bench.judged(work / who / one)[0] for who in ("cpu", "gpu")]
    show(Console(width=120), rows, cpu, gpu)
    write_json(HERE / f"results/devices-{name}.json", {"cpu": cpu, "gpu": gpu, "calibration_tokens": int(tokens.size), "rows": rows})


if __name__ == "__main__":
    main()
