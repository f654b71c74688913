"""Mean KL divergence and time of our recipes beside the peers', on the same tokens, in one run.

    python -m benchmarks.quality                                     # the demo model, all peers; some hours on two cores
    python -m benchmarks.quality --bits 3 --groups 128 --peers autoround
    python -m benchmarks.quality --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.quality --draws 6 --only gptq 'llmcompressor gptq'     # how much is chance

Each peer runs in an environment of its own, made on first use under ~/.cache/quantline-peers. Writes
benchmarks/results/quality-<model>.json and prints the table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.rounding import calibrate, round_model
from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.recipes import RECIPES
from quantline.recipes.context import Work
from quantline.files import write_json

HERE = Path(__file__).parent
PEERS = [("llmcompressor", "gptq"), ("llmcompressor", "awq"), ("gptqmodel", "gptq"), ("autoround", "autoround")]
ENVIRONMENTS = Path.home() / ".cache/quantline-peers"


def recipes(bits: int, group_size: int) -> dict[str, dict]:
    """Our recipes by name."""
    grid = {"bits": bits, "group_size": group_size, "symmetric": False}
    return {
        "rtn": {"method": "rtn", **grid}, "awq": {"method": "awq", **grid}, "gptq": {"method": "gptq", **grid},
        "gptq symmetric": {"method": "gptq", **grid, "symmetric": True},
        "awq + gptq": {"method": "awq", "rounding": "gptq", **grid},
        "gptq + curvature": {"method": "gptq", "curvature": True, **grid},
        "awq + gptq + curvature": {"method": "awq", "rounding": "gptq", "curvature": True, **grid},
    }


def environment(peer: str) -> Path:
    """The Python of a peer's environment."""
    python = ENVIRONMENTS / peer / "bin/python"
    if not (ENVIRONMENTS / peer / "complete").is_file():
        wanted = json.loads((HERE / "peers/requirements.json").read_text(encoding="utf-8"))[peer]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENTS / peer)], check=True)
        for part in (wanted[:1], wanted):  # torch first and alone, so that nothing draws in another build of it
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *part], check=True)
        (ENVIRONMENTS / peer / "complete").touch()
    return python


class Bench:
    """One model, its calibration and evaluation tokens, and the distribution of the unquantized model."""

    def __init__(self, model: Path, calibration: Path, evaluation: Path, sequences: tuple[int, int], length: int,
                 draws: int = 1) -> None:
        self.checkpoint, tokenizer = Checkpoint(model), Tokenizer(model)
        texts = [[part for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
                 for path in (calibration, evaluation)]
        if calibration == evaluation:  # one text: calibration has the first half
            half = len(texts[0]) // 2
            texts = [texts[0][:half], texts[0][half:]]
        drawn, self.evaluation = (tokenizer.pack(text, count, length)
                                  for text, count in zip(texts, (draws * sequences[0], sequences[1]), strict=True))
        if len(drawn) < draws * sequences[0]:
            raise SystemExit(f"expected {draws * sequences[0]} sequences of calibration text, found {len(drawn)}; take fewer draws")
        self.draws = np.split(drawn, draws)
        self.calibration = self.draws[0]
        self.facts = architecture(self.checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.original = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.reference = self.logprobs()

    @torch.inference_mode()
    def logprobs(self) -> torch.Tensor:
        return torch.cat([torch.log_softmax(self.model(part.long()).logits, -1)
                          for part in torch.from_numpy(self.evaluation).split(8)])

    def divergence(self, logprobs: torch.Tensor) -> tuple[float, float]:
        """(mean KL divergence, its standard error)."""
        each = (self.reference.exp() * (self.reference - logprobs)).sum(-1, dtype=torch.float64).reshape(-1)
        return float(each.mean()), float(each.std() / len(each)**0.5)

    def calibrate(self, folder: Path, curvature: bool) -> dict[str, float]:
        """The time that our calibration takes."""
        started, used = time.perf_counter(), time.process_time()
        calibrate(self.checkpoint, self.calibration, folder, curvature)
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}

    def ours(self, recipe: dict, calibration: Path) -> dict:
        """Divergence and seconds of one of our recipes."""
        with tempfile.TemporaryDirectory() as folder:
            started, used = time.perf_counter(), time.process_time()
            work = Work(RECIPES[recipe["method"]](**recipe), self.checkpoint, self.facts, Moments(calibration),
                        QuantizedWriter(Path(folder)))
            round_model(work)
            work.writer.close({})
            took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
            found = self.judged(Path(folder))
        return {"kld": found[0], "se": found[1], **took}

    @torch.no_grad()
    def judged(self, folder: Path) -> tuple[float, float]:
        """(mean KL divergence, its standard error) of a rounded model."""
        quantized, parameters = Quantized(folder), dict(self.model.named_parameters())
        for name in quantized.linears:
            parameters[f"{name}.weight"].copy_(torch.from_numpy(quantized.linear(name).dequantize()))
        for name in quantized.overrides:
            parameters[name].copy_(torch.from_numpy(quantized.override(name)))
        found = self.divergence(self.logprobs())
        for name, value in self.original.items():
            parameters[name].copy_(value)
        return found

    @property
    def name(self) -> str:
        """The model's folder and the one that it is in."""
        folder = self.checkpoint.folder.resolve()
        return f"{folder.parent.name}-{folder.name}"

    def report(self, seconds: dict[str, dict], rows: list[dict]) -> dict:
        """What is written of the rows so far."""
        return {"model": self.name, "calibration_tokens": int(self.calibration.size), "calibration_seconds": seconds,
                "evaluation_tokens": int(self.evaluation.size), "threads": os.cpu_count(), "draws": len(self.draws), "rows": rows,
                "ratios": dict(ratios(averaged(rows), seconds))}

    def peer(self, peer: str, method: str, bits: int, group_size: int) -> dict:
        """Divergence and seconds of a peer, or what it said when it failed."""
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            np.savez(folder / "tokens.npz", calibration=self.calibration, evaluation=self.evaluation)
            job = {"model": str(self.checkpoint.folder.resolve()), "method": method, "bits": bits, "group_size": group_size}
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            done = subprocess.run([str(environment(peer)), str(HERE / "peers" / f"{peer}_peer.py"), str(folder)],
                                  capture_output=True, text=True, check=False, cwd=folder,
                                  env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""})
            if not (folder / "done.json").is_file():
                return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
            took = json.loads((folder / "done.json").read_text(encoding="utf-8"))
            kld, error = self.divergence(torch.from_numpy(np.load(folder / "logprobs.npy")))
        return {"kld": kld, "se": error, **took}


def averaged(rows: list[dict]) -> list[dict]:
    """One row of each grid and recipe, with the means over the draws in which it did not fail, and of the divergence also the
    standard error of that mean over the draws.
    """
    found = []
    for key in dict.fromkeys((row["bits"], row["group_size"], row["who"]) for row in rows):
        same = [row for row in rows if (row["bits"], row["group_size"], row["who"]) == key]
        done = [row for row in same if "kld" in row]
        mean = {name: float(np.mean([row[name] for row in done])) for name in ("kld", "se", "seconds", "cpu_seconds") if done}
        over = {"se": float(np.std([row["kld"] for row in done], ddof=1) / len(done)**0.5)} if len(done) > 1 else {}
        found.append(same[0] | mean | over)
    return found


def ratios(rows: list[dict], calibration: dict[str, dict[str, float]]) -> Iterator[tuple[str, float]]:
    """(what, ours over theirs): divergence per grid, and time per variant and for the sweep of GPTQ and AWQ."""
    for grid in sorted({(row["bits"], row["group_size"]) for row in rows}, reverse=True):
        found = {row["who"]: row for row in rows if (row["bits"], row["group_size"]) == grid and "kld" in row}
        best = min((name for name in found if name.endswith("curvature")), key=lambda name: found[name]["kld"], default=None)
        for ours, theirs in [("gptq", "llmcompressor gptq"), ("awq", "llmcompressor awq"),
                             ("gptq symmetric", "gptqmodel gptq"), (best, "autoround autoround")]:
            if ours in found and theirs in found:
                yield f"divergence at {grid[0]} bits, groups of {grid[1]}: {ours} over {theirs}", found[ours]["kld"] / found[theirs]["kld"]
        for kind in ("seconds", "cpu_seconds"):
            if best and "autoround autoround" in found:
                theirs, more = found["autoround autoround"][kind], found[best][kind]
                yield f"{kind} at {grid[0]} bits, groups of {grid[1]}: {best} over autoround", more / theirs
                yield f"{kind} at {grid[0]} bits, groups of {grid[1]}: {best} with its calibration over autoround", (calibration["curvature"][kind] + more) / theirs
            peers = [found[name][kind] for name in ("llmcompressor gptq", "gptqmodel gptq") if name in found]
            if peers and "gptq" in found:
                yield (f"{kind} at {grid[0]} bits, groups of {grid[1]}: gptq with its calibration over the fastest peer",
                       (calibration["plain"][kind] + found["gptq"][kind]) / min(peers))
    for kind in ("seconds", "cpu_seconds"):
        theirs = [row[kind] for row in rows if row["who"] in ("llmcompressor gptq", "llmcompressor awq") and "kld" in row]
        ours = [row[kind] for row in rows if row["who"] in ("gptq", "awq")]
        if theirs and len(ours) == len(theirs):
            yield f"{kind} of a sweep of {len(ours)} variants over llmcompressor", (calibration["plain"][kind] + sum(ours)) / sum(theirs)


def show(rows: list[dict], console: Console) -> None:
    """The table; a peer's seconds have its calibration in them, ours have it in a line of its own."""
    table = Table(box=None)
    for title in ("bits", "group", "who", "mean KL divergence", "±", "seconds"):
        table.add_column(title, justify="left" if title == "who" else "right")
    for row in rows:
        figures = (["failed: " + row["failed"][:60], "", ""] if "failed" in row else
                   [f"{row['kld']:.5f}", f"{row['se']:.5f}", f"{row['seconds']:.1f}"])
        table.add_row(str(row["bits"]), str(row["group_size"]), row["who"], *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--calibration", type=Path, default=Path("demo/data/calibration.txt"))
    parser.add_argument("--evaluation", type=Path, default=Path("demo/data/evaluation.txt"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--peers", nargs="*", default=sorted({peer for peer, _ in PEERS}))
    parser.add_argument("--sequences", type=int, nargs=2, default=[128, 100], help="calibration and evaluation sequences")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", nargs="+", help="the recipes to run, as the table names them: gptq 'llmcompressor gptq'")
    parser.add_argument("--draws", type=int, default=1, help="neighbouring parts of the calibration text to calibrate on in turn")
    asked = parser.parse_args()
    console = Console()
    torch.set_num_threads(os.cpu_count())
    bench = Bench(asked.model, asked.calibration, asked.evaluation, tuple(asked.sequences), asked.length, asked.draws)
    rows, times = [], []
    for number, drawn in enumerate(bench.draws):
        bench.calibration = drawn
        with tempfile.TemporaryDirectory() as work:
            times.append({name: bench.calibrate(Path(work) / name, name == "curvature") for name in ("plain", "curvature")})
            for name in ("awq", "gptq", "gptq + curvature") if not rows else ():  # compiles the kernels
                bench.ours(recipes(4, asked.groups[0])[name], Path(work) / "curvature")
            for bits, group_size in product(asked.bits, asked.groups):
                grid = {"bits": bits, "group_size": group_size, "draw": number}
                for name, recipe in recipes(bits, group_size).items():
                    if name in (asked.only or [name]):
                        rows.append(grid | {"who": name} | bench.ours(recipe, Path(work) / "curvature"))
                for peer, method in PEERS:
                    if peer in asked.peers and f"{peer} {method}" in (asked.only or [f"{peer} {method}"]):
                        rows.append(grid | {"who": f"{peer} {method}"} | bench.peer(peer, method, bits, group_size))
                show(averaged(rows), console)
                write_json(HERE / "results" / f"quality-{bench.name}{'-draws' if asked.draws > 1 else ''}.json",
                           bench.report(times[0], rows))
    for what, ratio in ratios(averaged(rows), times[0]):
        console.print(f"{ratio:8.4f}  {what}", highlight=False)
    console.print(f"our calibration: {times[0]['plain']['seconds']:.1f} s, with gradients {times[0]['curvature']['seconds']:.1f} s")


if __name__ == "__main__":
    main()
