"""Recipes fitted to a budget beside the uniform mixes and grids of the same size, and what was predicted beside what came.

    python -m benchmarks.budget                                          # the demo model
    python -m benchmarks.budget --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.budget --methods kquant --mixes Q4_K_M Q3_K_M --grids

Both of a pair are rounded by the same method, and the fitted one is at most as large. Divergence is that of the dequantized
weights; `±` of the difference is the standard error of the paired difference, token by token. Writes
benchmarks/results/budget-<model>.json and prints the table.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality import HERE, Bench
from benchmarks.rounding import round_model
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.calibration.collect import Moments
from quantline.config.recipes import RECIPES
from quantline.methods.ggml.block_types import dequantize
from quantline.recipes.budget.fit import fit, plan_of
from quantline.recipes.context import Work
from quantline.files import write_json

TOLD = ("predicted", "predicted_without", "bytes", "fixed_bytes", "price_per_mib", "chosen")
GROUPED = {"rtn": {}, "gptq": {}, "gptq-curvature": {"curvature": True}, "awq": {}, "awq-gptq": {"rounding": "gptq"}}


def recipe(method: str, size: str, fitted: bool) -> dict:
    """A recipe by our names for methods (kquant, gptq, gptq-curvature, ...) and sizes (Q4_K_M, w4g128)."""
    budget = {"budget": {}} if fitted else {}
    if method.startswith("kquant"):
        return {"method": method, "mix": size, **budget}
    bits, group_size = size[1:].split("g")
    return {"method": method.partition("-")[0], "bits": int(bits), "group_size": int(group_size), "symmetric": False,
            **GROUPED[method], **budget}


def measure(bench: Bench, asked: dict, calibration: Path) -> tuple[dict, torch.Tensor]:
    """(seconds, bytes, and what was chosen by a recipe, its divergence on each evaluation token)."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        work = Work(RECIPES[asked["method"]](**asked), bench.checkpoint, bench.facts, Moments(calibration),
                    QuantizedWriter(Path(folder)))
        work, told = fit(work, {"name": "budget", **work.recipe.model_dump(mode="json")}, Path(folder))
        found, chose = {"seconds_choosing": time.perf_counter() - started}, time.perf_counter()
        round_model(work)
        work.writer.close({})
        found["seconds_rounding"] = time.perf_counter() - chose
        quantized, parameters = Quantized(folder), dict(bench.model.named_parameters())
        with torch.no_grad():
            for name in quantized.blocks_names:
                kind, data, shape = quantized.blocks(name)
                if kind not in ("F32", "F16"):
                    parameters[name].copy_(torch.from_numpy(dequantize(data, kind)).reshape(shape))
            for name in quantized.linears:
                parameters[f"{name}.weight"].copy_(torch.from_numpy(quantized.linear(name).dequantize()))
            for name in quantized.overrides:
                parameters[name].copy_(torch.from_numpy(quantized.override(name)))
            logprobs = bench.logprobs()
            for name, value in bench.original.items():
                parameters[name].copy_(value)
    each = (bench.reference.exp() * (bench.reference - logprobs)).sum(-1, dtype=torch.float64).reshape(-1)
    found |= {"kld": float(each.mean()), "se": float(each.std() / len(each)**0.5)}
    if told:
        found |= {key: told[0][key] for key in TOLD}
    else:
        plan = plan_of(Work(RECIPES[asked["method"]](**asked, budget={}), bench.checkpoint, bench.facts, Moments(calibration),
                            work.writer), {"name": "uniform", **asked})
        found |= {"bytes": sum(plan.size(name, what) for name, what in plan.before.items()), "fixed_bytes": plan.tensors}
    return found, each


def pair(bench: Bench, method: str, size: str, calibration: Path) -> dict:
    """A uniform recipe and the one that is fitted to its size."""
    (uniform, plain), (fitted, ours) = (measure(bench, recipe(method, size, budget), calibration) for budget in (False, True))
    if not fitted["bytes"] <= uniform["bytes"]:
        raise SystemExit(f"expected at most {uniform['bytes']} bytes, found {fitted['bytes']}")
    difference = ours - plain
    return {"method": method, "size": size, "uniform": uniform, "fitted": fitted, "ratio": fitted["kld"] / uniform["kld"],
            "difference": float(difference.mean()), "difference_se": float(difference.std() / len(difference)**0.5)}


def show(rows: list[dict], console: Console) -> None:
    table = Table(box=None)
    for title in ("rounded by", "size of", "MiB", "uniform: KL divergence", "predicted", "fitted: KL divergence", "predicted",
                  "ratio", "difference"):
        table.add_column(title, justify="left" if title in ("rounded by", "size of") else "right")
    for row in rows:
        uniform, fitted = row["uniform"], row["fitted"]
        table.add_row(row["method"], row["size"], f"{(fitted['bytes'] + fitted['fixed_bytes']) / 2**20:.3f}",
                      f"{uniform['kld']:.6f} ± {uniform['se']:.6f}", f"{fitted['predicted_without']:.6f}",
                      f"{fitted['kld']:.6f} ± {fitted['se']:.6f}", f"{fitted['predicted']:.6f}", f"{row['ratio']:.3f}",
                      f"{row['difference']:+.6f} ± {row['difference_se']:.6f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--calibration", type=Path, default=Path("demo/data/calibration.txt"))
    parser.add_argument("--evaluation", type=Path, default=Path("demo/data/evaluation.txt"))
    parser.add_argument("--methods", nargs="+", default=["kquant", "kquant-curvature", "gptq", "awq-gptq"])
    parser.add_argument("--mixes", nargs="*", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--grids", nargs="*", default=["w4g128", "w3g128"])
    parser.add_argument("--sequences", type=int, nargs=2, default=[128, 100], help="of calibration and evaluation")
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()
    console, threads, rows = Console(width=160), os.cpu_count(), []
    torch.set_num_threads(threads)
    bench = Bench(asked.model, asked.calibration, asked.evaluation, tuple(asked.sequences), asked.length)
    with tempfile.TemporaryDirectory() as work:
        calibration = Path(work) / "curvature"
        seconds = bench.calibrate(calibration, True)
        for method in asked.methods:
            for size in asked.mixes if method.startswith("kquant") else asked.grids:
                rows.append(pair(bench, method, size, calibration))
                show(rows, console)
                write_json(HERE / "results" / f"budget-{bench.name}.json", {
                    "model": bench.name, "calibration": asked.calibration.name, "evaluation": asked.evaluation.name,
                    "calibration_tokens": int(bench.calibration.size), "evaluation_tokens": int(bench.evaluation.size),
                    "calibration_seconds": seconds, "threads": threads, "rows": rows})


if __name__ == "__main__":
    main()
