"""A checkpoint to a quantized GGUF file: our one pass beside llama.cpp's two steps.

    python -m benchmarks.gguf        # fetches llama-cpp-python's source for the converter
    python -m benchmarks.gguf --source llama_cpp_python-0.3.36.tar.gz
    python -m benchmarks.gguf --source ~/llama.cpp       # a folder or a checkout does as well
    python -m benchmarks.gguf --blocks 2 --mixes Q6_K --importance without

llama.cpp's steps are its converter and then llama_model_quantize. The model is a Llama of random
weights in bfloat16 with the demo's tokenizer. Both sides get the same importance matrix and run in
processes of their own, imports and all, with as many threads as there are cores. Ours is timed with
ggml's kernel, whose tensors have to be those of llama.cpp to the bit, and with our own. Writes
benchmarks/results/gguf.json.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.gguf.converter import CONVERT, PACKAGE, find_converter
from benchmarks.gguf.files import compare_files, write_importance_matrix
from benchmarks.gguf.timed_commands import run_timed
from benchmarks.paths import RESULTS
from benchmarks.random_models import write_wide_llama
from quantline.files import MIB, folder_bytes, versions, write_json
from quantline.methods.ggml.quantize import SEARCHED_TYPES, quantize_blocks
from quantline.model.gguf_files import model_files

LIMITS = {"ggml": 0.67, "numba": 0.3}  # wanted: our seconds over llama.cpp's, by kernel
TITLES = (
    "mix",
    "importance",
    "by",
    "seconds",
    "of llama.cpp's",
    "wanted",
    "CPU s",
    "of llama.cpp's",
    "MiB written",
    "peak MiB",
    "equal tensors",
    "equal blocks",
)

Row = dict[str, Any]


def prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Make the model and its importance matrix, and warm up caches.

    Args:
        options: Of the command line.
        folder: Where to work; a model that is there already is used again.

    Returns:
        The folder of llama.cpp with its converter.
    """
    folder.mkdir(exist_ok=True)
    model = folder / "model"
    if not model.is_dir():
        write_wide_llama(model, options.blocks)
        write_importance_matrix(folder / "calibration", model)
    checkout = find_converter(options.source, folder)
    (folder / "convert.py").write_text(CONVERT)
    for path in model.iterdir():  # so that the page cache holds it
        path.read_bytes()
    if "numba" in options.kernels:
        for ggml_type in SEARCHED_TYPES:  # compiled once, and cached for every later run
            quantize_blocks(np.ones((1, 256), np.float32), ggml_type, kernel="numba")
    return checkout


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both sides for every mix, and write the results after each run.

    Returns:
        The results.
    """
    checkout = prepare(options, folder)
    rows: list[Row] = []
    results = {
        "threads": os.cpu_count(),
        "model_mib": folder_bytes(folder / "model") / MIB,
        "versions": versions("gguf", PACKAGE, "numba", "numpy"),
        "rows": rows,
    }
    for mix, importance in product(options.mixes, options.importance):
        for row in run_both(options.kernels, folder, checkout, mix, importance):
            rows.append({"mix": mix, "importance": importance == "with", **row})
            write_json(RESULTS / "gguf.json", results)
    return results


def run_both(
    kernels: list[str], folder: Path, checkout: Path, mix: str, importance: str
) -> Iterator[Row]:
    """Run llama.cpp's two steps, then ours with each kernel, and compare the files.

    Args:
        kernels: Of ours.
        folder: Holds the model and convert.py.
        checkout: Of llama.cpp.
        mix: Its name for the choice of types.
        importance: "with" or "without" the importance matrix.

    Yields:
        A row for each.
    """
    module = [sys.executable, "-m"]
    matrix = []
    if importance == "with":
        matrix = ["--importance", str(folder / "calibration/imatrix.gguf")]
    theirs = folder / "theirs"
    plain = theirs / "bf16.gguf"
    target = theirs / "quantized.gguf"
    convert = [
        *(sys.executable, str(folder / "convert.py"), str(checkout)),
        *(str(checkout / "convert_hf_to_gguf.py"), str(folder / "model")),
        *("--outfile", str(plain), "--outtype", "bf16"),
    ]
    quantize = [*module, "benchmarks.gguf.llama_cpp", str(plain), str(target), mix, *matrix]
    first = run_timed(theirs, convert, quantize)
    yield {"by": "llama.cpp", **first}
    for kernel in kernels:
        into = folder / f"ours-{kernel}"
        command = [*module, "benchmarks.gguf.ours", str(folder), str(into), mix, kernel, *matrix]
        run = run_timed(into, command)
        yield {
            "by": kernel,
            **run,
            "over_theirs": run["seconds"] / first["seconds"],
            "cpu_over_theirs": run["cpu_seconds"] / first["cpu_seconds"],
            "wanted": LIMITS[kernel],
            **compare_files(model_files(into / "bundle")[0], target),
        }


def print_results(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(*TITLES, box=None)
    for row in results["rows"]:
        ours = row["by"] != "llama.cpp"
        table.add_row(
            row["mix"],
            "yes" if row["importance"] else "no",
            row["by"],
            " + ".join(f"{seconds:.1f}" for seconds in row["steps"]),
            f"{row['over_theirs']:.2f}" if ours else "",
            str(row["wanted"]) if ours else "",
            f"{row['cpu_seconds']:.1f}",
            f"{row['cpu_over_theirs']:.2f}" if ours else "",
            f"{row['written_mib']:.0f}",
            f"{row['peak_disk_mib']:.0f}",
            f"{row['tensors_equal']} of {row['tensors']}" if ours else "",
            f"{row['equal_share']:.4%}" if ours else "",
        )
    console = Console(width=130)
    console.print(table)
    console.print(f"{results['model_mib']:.0f} MiB of bfloat16 in {results['threads']} threads")


def check_equal(rows: list[Row]) -> None:
    """Check that ggml's kernel made llama.cpp's tensors. Raises SystemExit if it did not."""
    for row in rows:
        if row["by"] == "ggml" and row["tensors_equal"] != row["tensors"]:
            raise SystemExit(
                f"expected all {row['tensors']} tensors to be llama.cpp's, found "
                f"{row['tensors_equal']}"
            )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gguf", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--source", help="llama-cpp-python's source distribution, or a checkout of llama.cpp"
    )
    parser.add_argument("--blocks", type=int, default=8, help="of the model; 86 MiB each")
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q6_K", "Q8_0"])
    parser.add_argument("--kernels", nargs="+", default=["ggml", "numba"])
    choices = ["without", "with"]
    parser.add_argument("--importance", nargs="+", default=choices, choices=choices)
    parser.add_argument(
        "--work", type=Path, help="a folder to work in that is kept, with the model"
    )
    return parser.parse_args()


def main() -> None:
    """Measure both sides in a temporary folder or in the one that is given."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        results = measure(options, folder)
    print_results(results)
    check_equal(results["rows"])


if __name__ == "__main__":
    main()
