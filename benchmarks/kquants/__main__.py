"""k-quants rounded by curvature beside ggml's own; and the speed of our kernel beside ggml's.

    python -m benchmarks.kquants                                        # the demo model
    python -m benchmarks.kquants --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.kquants --calibration other.txt --name unlike  # unlike the evaluation text
    python -m benchmarks.kquants --kernels                              # the speeds alone

All use an importance matrix, the first as llama.cpp makes it. All roundings of a mix have the same
types, so the same size to the byte. Divergence, perplexity and answers are those of the dequantized
weights. Writes benchmarks/results/kquants-<model>[-<name>].json, with --kernels
kquants-kernels.json, and prints the tables.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kquants.gold_answers import GoldAnswers
from benchmarks.kquants.kernels import kernel_table, measure_kernels
from benchmarks.model_under_test import ModelUnderTest, add_model_options
from benchmarks.paths import DEMO_DATA, DEMO_MODEL, RESULTS
from benchmarks.tables import number_table
from quantline.calibration.store import INFO
from quantline.files import write_json
from quantline.methods.ggml.curvature import quantize_by_curvature
from quantline.methods.ggml.quantize import SEARCHED_TYPES

# Row → method, and which calibration it has: llama.cpp's matrix counts all tokens alike.
ROUNDINGS = {
    "kquant, tokens alike": ("kquant", "equal"),
    "kquant": ("kquant", "gradient"),
    "kquant-curvature": ("kquant-curvature", "gradient"),
}
TITLES = (
    "mix",
    "rounded by",
    "mean KL divergence",
    "±",
    "of the first",
    "perplexity",
    "gold flips",
    "bytes",
    "seconds",
)
PROGRESS_KEYS = ("mix", "rounded by", "kld", "gold_flips", "seconds")


def compile_kernels() -> None:
    """Round something small in every type, so that compiling is no part of the measured time."""
    draw = np.random.default_rng(0)
    identity = np.eye(256, dtype=np.float32)
    fisher_out = np.eye(8, dtype=np.float32)[None]
    for ggml_type in SEARCHED_TYPES:
        weight = draw.normal(size=(8, 256)).astype(np.float32)
        quantize_by_curvature(weight, ggml_type, identity, fisher_out)


def perplexity(model: ModelUnderTest, logprobs: torch.Tensor) -> float:
    """Return the perplexity on the evaluation text of log-probabilities [n, length, V]."""
    following = torch.from_numpy(model.evaluation[:, 1:]).long()[:, :, None]
    likelihoods = logprobs[:, :-1].gather(2, following)
    return float((-likelihoods.mean(dtype=torch.float64)).exp())


def measure_quantized(
    model: ModelUnderTest, folder: Path, answers: GoldAnswers | None
) -> dict[str, Any]:
    """Return divergence, perplexity, gold figures and bytes of a quantized model.

    Args:
        model: The unquantized model.
        folder: Of the quantized one.
        answers: Of the gold set, if there is one.
    """
    with model.quantized_weights(folder) as quantized:
        size = sum(quantized.ggml_blocks(name).data.nbytes for name in quantized.ggml_names)
        logprobs = model.logprobs()
        gold = answers.compare() if answers else {}
    return {
        **model.divergence(logprobs),
        "perplexity": perplexity(model, logprobs),
        "bytes": size,
        **gold,
    }


def compare_mixes(
    model: ModelUnderTest, mixes: list[str], calibrations: Path, answers: GoldAnswers | None
) -> list[dict[str, Any]]:
    """Return the rows of the roundings of each mix, one after the other.

    Args:
        model: What to quantize.
        mixes: llama.cpp's names.
        calibrations: The folder of the calibrations, by how tokens count.
        answers: Of the gold set, if there is one.

    Raises:
        SystemExit: If they are not of one size.
    """
    compile_kernels()
    rows: list[dict[str, Any]] = []
    for mix in mixes:
        for label, (method, weights) in ROUNDINGS.items():
            recipe = {"method": method, "mix": mix}
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                times = model.quantize(recipe, calibrations / weights, folder)
                figures = measure_quantized(model, folder, answers)
            rows.append({"mix": mix, "rounded by": label} | times | figures)
            print({key: rows[-1][key] for key in PROGRESS_KEYS if key in rows[-1]}, flush=True)
        sizes = {row["bytes"] for row in rows if row["mix"] == mix}
        if len(sizes) > 1:
            raise SystemExit(f"expected equal sizes at {mix}, found {sorted(sizes)}")
    return rows


def divergence_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return "mix, rounding" → its divergence over that with llama.cpp's importance matrix."""
    first = next(iter(ROUNDINGS))
    theirs = {row["mix"]: row["kld"] for row in rows if row["rounded by"] == first}
    return {
        f"{row['mix']}, {row['rounded by']}": row["kld"] / theirs[row["mix"]]
        for row in rows
        if row["rounded by"] != first
    }


def mix_table(rows: list[dict[str, Any]], ratios: dict[str, float]) -> Table:
    """Return the table of what `compare_mixes` returned."""
    cells = []
    for row in rows:
        ratio = ratios.get(f"{row['mix']}, {row['rounded by']}")
        cells.append(
            [
                row["mix"],
                row["rounded by"],
                f"{row['kld']:.6f}",
                f"{row['se']:.6f}",
                "" if ratio is None else f"{ratio:.3f}",
                f"{row['perplexity']:.4f}",
                str(row.get("gold_flips", "")),
                str(row["bytes"]),
                f"{row['seconds']:.1f}",
            ]
        )
    return number_table(TITLES, cells)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kquants", description=__doc__.splitlines()[0]
    )
    add_model_options(parser)
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument(
        "--gold", type=Path, help="gold set of the model; the demo model has its own"
    )
    parser.add_argument("--name", help="of this run, in the name of the results")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder that keeps the calibrations, for another run with the same texts",
    )
    parser.add_argument("--kernels", action="store_true", help="time the kernels instead")
    return parser.parse_args()


def run_kernels(console: Console, threads: int) -> None:
    """Measure the speeds of the kernels."""
    kernels = measure_kernels(threads)
    console.print(kernel_table(kernels))
    write_json(RESULTS / "kquants-kernels.json", {"threads": threads, "kernels": kernels})


def run_mixes(options: argparse.Namespace, console: Console, threads: int) -> None:
    """Measure all roundings of every mix."""
    model = ModelUnderTest.of_options(options)
    gold = options.gold
    if gold is None and options.model == DEMO_MODEL:
        gold = DEMO_DATA / "gold.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        calibrations = options.work or Path(temporary)
        calibrations.mkdir(parents=True, exist_ok=True)
        times = None
        if not (calibrations / "equal" / INFO).is_file():
            model.calibrate(calibrations / "equal", gradients=False)
        if not (calibrations / "gradient" / INFO).is_file():
            times = model.calibrate(calibrations / "gradient", gradients=True)
        answers = GoldAnswers(model, gold) if gold else None
        rows = compare_mixes(model, options.mixes, calibrations, answers)
    ratios = divergence_ratios(rows)
    full_precision = perplexity(model, model.reference)
    console.print(mix_table(rows, ratios))
    summary = f"full precision has perplexity {full_precision:.4f}"
    if times:
        summary += f"; our calibration took {times['seconds']:.1f} s"
    console.print(summary)
    suffix = f"-{options.name}" if options.name else ""
    parent = options.model.resolve().parent.name
    results = {
        "model": options.model.name,
        "calibration": options.calibration.name,
        "evaluation": [path.name for path in options.evaluation],
        "calibration_tokens": int(model.calibration.size),
        "evaluation_tokens": int(model.evaluation.size),
        "perplexity": full_precision,
        "calibration_seconds": times,
        "threads": threads,
        "rows": rows,
        "ratios": ratios,
    }
    write_json(RESULTS / f"kquants-{parent}-{options.model.name}{suffix}.json", results)


def main() -> None:
    """Measure the kernels or the mixes."""
    options = parse_options()
    console = Console(width=120)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    if options.kernels:
        run_kernels(console, threads)
    else:
        run_mixes(options, console, threads)


if __name__ == "__main__":
    main()
