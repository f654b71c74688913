"""k-quants rounded by curvature beside ggml's own with the importance matrix, and our kernel's speed beside ggml's.

    python -m benchmarks.kquants                                         # the demo model
    python -m benchmarks.kquants --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.kquants --calibration other.txt --name unlike   # calibration text unlike the evaluation text

Both roundings of a mix have the same types, so the same size to the byte. Divergence and perplexity are those of the
dequantized weights. Writes benchmarks/results/kquants-<model>[-<name>].json and prints the tables.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality import HERE, Bench
from stages.checkpoints.canonical import Quantized, QuantizedWriter
from stages.checkpoints.moments import Moments
from stages.config import RECIPES
from stages.methods import kquant
from stages.methods.ggml_blocks import dequantize
from stages.recipes import round_block
from stages.recipes.work import Work
from stages.tracking import write_json

WEIGHTS = (1024, 4096)  # rows and width of the weight that the kernels are timed on


def rounded(bench: Bench, recipe: dict, calibration: Path) -> dict:
    """Divergence, perplexity, bytes and seconds of a recipe that makes ggml blocks."""
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.perf_counter(), time.process_time()
        work = Work(RECIPES[recipe["method"]](**recipe), bench.checkpoint, bench.facts, Moments(calibration),
                    QuantizedWriter(Path(folder)))
        for layer in [*range(bench.facts.layers), None]:
            work.writer.close_part("rest" if layer is None else f"block-{layer:03d}", round_block(work, layer))
        work.writer.close({})
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
        quantized, parameters, size = Quantized(folder), dict(bench.model.named_parameters()), 0
        with torch.no_grad():
            for name in quantized.blocks_names:
                kind, data, shape = quantized.blocks(name)
                size += data.nbytes
                if kind not in ("F32", "F16"):
                    parameters[name].copy_(torch.from_numpy(dequantize(data, kind)).reshape(shape))
            logprobs = bench.logprobs()
            for name, value in bench.original.items():
                parameters[name].copy_(value)
    kld, error = bench.divergence(logprobs)
    return {"kld": kld, "se": error, "perplexity": perplexity(bench, logprobs), "bytes": size, **took}


def perplexity(bench: Bench, logprobs: torch.Tensor) -> float:
    """Of the evaluation tokens, each after those before it."""
    after = torch.from_numpy(bench.evaluation[:, 1:]).long()[:, :, None]
    return float((-logprobs[:, :-1].gather(2, after).mean(dtype=torch.float64)).exp())


def speeds(threads: int) -> list[dict]:
    """Per type, without and with importance: weights per second of both kernels, and the share of equal blocks."""
    draw = np.random.default_rng(0)
    weight = (draw.standard_t(5, size=WEIGHTS) * 0.02).astype(np.float32)
    importance, rows = np.exp(draw.normal(size=WEIGHTS[1])).astype(np.float32), []
    for kind in kquant.SEARCHED:
        for weights in (None, importance):
            made, rate = {}, {}
            for kernel in ("numba", "ggml"):
                kquant.quantize(weight[:16], kind, weights, threads, kernel)  # compiles
                best = np.inf
                for _ in range(3):
                    started = time.perf_counter()
                    made[kernel] = kquant.quantize(weight, kind, weights, threads, kernel)
                    best = min(best, time.perf_counter() - started)
                rate[kernel] = weight.size / best / 1e6
            blocks = [one.reshape(weight.size // 256, -1) for one in made.values()]
            rows.append({"type": kind, "importance": weights is not None, "mweights_s": rate["numba"],
                         "ggml_mweights_s": rate["ggml"], "ratio": rate["numba"] / rate["ggml"],
                         "equal": float((blocks[0] == blocks[1]).all(1).mean())})
    return rows


def table(titles: list[str], rows: list[list[str]]) -> Table:
    made = Table(box=None)
    for title in titles:
        made.add_column(title, justify="left" if title in ("mix", "rounded by", "type") else "right")
    for row in rows:
        made.add_row(*row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--calibration", type=Path, default=Path("demo/data/calibration.txt"))
    parser.add_argument("--evaluation", type=Path, default=Path("demo/data/evaluation.txt"))
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--sequences", type=int, nargs=2, default=[128, 100], help="of calibration and evaluation")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--name", help="of this run, in the name of the results")
    asked = parser.parse_args()
    console, threads = Console(width=110), os.cpu_count()
    torch.set_num_threads(threads)
    bench = Bench(asked.model, asked.calibration, asked.evaluation, tuple(asked.sequences), asked.length)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        calibration = bench.calibrate(Path(work) / "curvature", True)
        rounded(bench, {"method": "kquant-curvature", "mix": "Q2_K", "rounds": 1}, Path(work) / "curvature")  # compiles
        for mix in asked.mixes:
            for method in ("kquant", "kquant-curvature"):
                found = rounded(bench, {"method": method, "mix": mix}, Path(work) / "curvature")
                rows.append({"mix": mix, "method": method, **found})
            if rows[-1]["bytes"] != rows[-2]["bytes"]:
                raise SystemExit(f"expected equal sizes at {mix}, found {rows[-1]['bytes']} and {rows[-2]['bytes']}")
    ratios = {one["mix"]: other["kld"] / one["kld"] for one, other in zip(rows[::2], rows[1::2], strict=True)}
    plain = perplexity(bench, bench.reference)
    console.print(table(["mix", "rounded by", "mean KL divergence", "±", "of kquant's", "perplexity", "bytes", "seconds"],
                        [[row["mix"], row["method"], f"{row['kld']:.6f}", f"{row['se']:.6f}",
                          "" if row["method"] == "kquant" else f"{ratios[row['mix']]:.3f}",
                          f"{row['perplexity']:.4f}", str(row["bytes"]), f"{row['seconds']:.1f}"] for row in rows]))
    console.print(f"full precision has perplexity {plain:.4f}; our calibration took {calibration['seconds']:.1f} s")
    timed = speeds(threads)
    console.print(table(["type", "importance", "M weights/s", "ggml's", "ratio", "equal blocks"],
                        [[row["type"], "yes" if row["importance"] else "no", f"{row['mweights_s']:.1f}",
                          f"{row['ggml_mweights_s']:.1f}", f"{row['ratio']:.2f}", f"{row['equal']:.4%}"] for row in timed]))
    name = f"kquants-{asked.model.resolve().parent.name}-{asked.model.name}" + (f"-{asked.name}" if asked.name else "")
    write_json(HERE / "results" / f"{name}.json", {
        "model": asked.model.name, "calibration": asked.calibration.name, "evaluation": asked.evaluation.name,
        "calibration_tokens": int(bench.calibration.size), "evaluation_tokens": int(bench.evaluation.size),
        "perplexity": plain, "calibration_seconds": calibration, "threads": threads, "rows": rows, "ratios": ratios,
        "kernels": timed})


if __name__ == "__main__":
    main()
