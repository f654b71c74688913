"""k-quants rounded by curvature beside ggml's own with the importance matrix; and our kernel's speed beside ggml's.

    python -m benchmarks.kquants                                         # the demo model
    python -m benchmarks.kquants --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.kquants --calibration other.txt --name unlike   # calibration text unlike the evaluation text
    python -m benchmarks.kquants --kernels                               # the speeds alone

Both roundings of a mix have the same types, so the same size to the byte. Divergence, perplexity and answers are those of
the dequantized weights. Writes benchmarks/results/kquants-<model>[-<name>].json, with --kernels kquants-kernels.json, and
prints the tables.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality import HERE, Bench
from benchmarks.rounding import round_model
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.calibration.collect import ABOUT, Moments
from quantline.text.tokenizer import Tokenizer
from quantline.config.recipes import RECIPES
from quantline.methods.ggml import curvature as kquant_curvature, quantize as kquant
from quantline.metrics.gold_set import GoldResult, TokenizedItem, load_gold
from quantline.metrics.scoring import score
from quantline.metrics.significance import compare_gold
from quantline.recipes.context import Work
from stages.reference import tokenize
from quantline.runtimes.runtime import greedy
from quantline.files import write_json

WEIGHTS = (1024, 4096)  # rows and width of the weight that the kernels are timed on


class Answers:
    """The bench's model with the weights that it has now, as scoring asks for it, and the gold set's questions."""

    def __init__(self, bench: Bench, gold: Path) -> None:
        tokenizer = Tokenizer(bench.checkpoint.folder)
        self.model, self.decode = bench.model, tokenizer.decode
        self.items: list[TokenizedItem] = [tokenize(item, tokenizer) for item in load_gold(gold)]
        self.baseline: list[GoldResult] = score(self, self.items)

    @torch.inference_mode()
    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        return torch.log_softmax(self.model(torch.from_numpy(tokens).long()).logits, -1).numpy()

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        so_far = list(prompt)

        def step(token: int | None) -> np.ndarray:
            so_far.extend([] if token is None else [token])
            return self.logprobs(np.array([so_far], np.int32))[0, -1]

        return greedy(step(None), step, max_new_tokens, stop)

    def compared(self) -> dict:
        """The gold figures beside the unquantized model's."""
        return compare_gold(self.baseline, score(self, self.items))


def made(bench: Bench, recipe: dict, calibration: Path, folder: Path) -> dict[str, float]:
    """The seconds of a recipe that makes ggml blocks, which it writes to a folder."""
    started, used = time.perf_counter(), time.process_time()
    work = Work(RECIPES[recipe["method"]](**recipe), bench.checkpoint, bench.facts, Moments(calibration), QuantizedWriter(folder))
    round_model(work)
    work.writer.close({})
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}


def measured(bench: Bench, folder: Path, answers: Answers | None) -> dict:
    """Divergence, perplexity, gold figures and bytes of a rounded model."""
    quantized, parameters, size = Quantized(folder), dict(bench.model.named_parameters()), 0
    with torch.no_grad():
        for name in quantized.blocks_names:
            kind, data, shape = quantized.blocks(name)
            size += data.nbytes
            values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
            parameters[name].copy_(torch.from_numpy(np.float32(values)).reshape(shape))
        logprobs, gold = bench.logprobs(), answers.compared() if answers else {}
        for name, value in bench.original.items():
            parameters[name].copy_(value)
    kld, error = bench.divergence(logprobs)
    return {"kld": kld, "se": error, "perplexity": perplexity(bench, logprobs), "bytes": size, **gold}


def compared(bench: Bench, mixes: list[str], calibration: Path, answers: Answers | None) -> list[dict]:
    """The rows of both roundings of each mix."""
    rows, draw = [], np.random.default_rng(0)
    for kind in kquant.SEARCHED:  # compiles
        kquant_curvature.quantize(draw.normal(size=(8, 256)).astype(np.float32), kind, np.eye(256, dtype=np.float32),
                                  np.eye(8, dtype=np.float32)[None])
    for mix in mixes:
        for method in ("kquant", "kquant-curvature"):
            with tempfile.TemporaryDirectory() as folder:
                took = made(bench, {"method": method, "mix": mix}, calibration, Path(folder))
                rows.append({"mix": mix, "method": method, **took, **measured(bench, Path(folder), answers)})
            print({key: rows[-1][key] for key in ("mix", "method", "kld", "gold_flips") if key in rows[-1]}, flush=True)
        if rows[-1]["bytes"] != rows[-2]["bytes"]:
            raise SystemExit(f"expected equal sizes at {mix}, found {rows[-1]['bytes']} and {rows[-2]['bytes']}")
    return rows


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
    parser.add_argument("--gold", type=Path, help="gold set of the model; the demo model has its own")
    parser.add_argument("--name", help="of this run, in the name of the results")
    parser.add_argument("--work", type=Path, help="folder that keeps the calibration, for another run with the same texts")
    parser.add_argument("--kernels", action="store_true", help="time the kernels instead")
    asked = parser.parse_args()
    console, threads = Console(width=120), os.cpu_count()
    torch.set_num_threads(threads)
    if asked.kernels:
        timed = speeds(threads)
        console.print(table(["type", "importance", "M weights/s", "ggml's", "ratio", "equal blocks"],
                            [[row["type"], "yes" if row["importance"] else "no", f"{row['mweights_s']:.1f}",
                              f"{row['ggml_mweights_s']:.1f}", f"{row['ratio']:.2f}", f"{row['equal']:.4%}"] for row in timed]))
        write_json(HERE / "results" / "kquants-kernels.json", {"threads": threads, "kernels": timed})
        return
    bench = Bench(asked.model, asked.calibration, asked.evaluation, tuple(asked.sequences), asked.length)
    gold = asked.gold or (Path("demo/data/gold.jsonl") if asked.model == Path("demo/model") else None)
    with tempfile.TemporaryDirectory() as temporary:
        calibration = (asked.work or Path(temporary)) / "curvature"
        calibration.parent.mkdir(parents=True, exist_ok=True)
        took = None if (calibration / ABOUT).is_file() else bench.calibrate(calibration, True)
        rows = compared(bench, asked.mixes, calibration, Answers(bench, gold) if gold else None)
    ratios = {one["mix"]: other["kld"] / one["kld"] for one, other in zip(rows[::2], rows[1::2], strict=True)}
    plain = perplexity(bench, bench.reference)
    console.print(table(
        ["mix", "rounded by", "mean KL divergence", "±", "of kquant's", "perplexity", "gold flips", "bytes", "seconds"],
        [[row["mix"], row["method"], f"{row['kld']:.6f}", f"{row['se']:.6f}",
          "" if row["method"] == "kquant" else f"{ratios[row['mix']]:.3f}", f"{row['perplexity']:.4f}",
          str(row.get("gold_flips", "")), str(row["bytes"]), f"{row['seconds']:.1f}"] for row in rows]))
    console.print(f"full precision has perplexity {plain:.4f}" + (f"; our calibration took {took['seconds']:.1f} s" if took else ""))
    name = f"kquants-{asked.model.resolve().parent.name}-{asked.model.name}" + (f"-{asked.name}" if asked.name else "")
    write_json(HERE / "results" / f"{name}.json", {
        "model": asked.model.name, "calibration": asked.calibration.name, "evaluation": asked.evaluation.name,
        "calibration_tokens": int(bench.calibration.size), "evaluation_tokens": int(bench.evaluation.size),
        "perplexity": plain, "calibration_seconds": took, "threads": threads, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
