"""Our perplexity and divergence beside llama.cpp's own `llama-perplexity`, in one run.

    python -m benchmarks.perplexity                    # the tool is fetched and built on first use
    python -m benchmarks.perplexity --source /path/to/llama_cpp_python-0.3.36
    python -m benchmarks.perplexity --models demo      # no random models of large vocabularies

Both sides get the same files, tokens and threads. The tool tokenizes the text, cuts it into chunks,
puts the begin token first where the model has one, and scores the second half of each chunk. Its
tokens are read from its own file and are what our reference and our evaluation get, and we score
the same positions. Seconds are those from the loaded model to the figures, on both sides: decoding,
reading or rebuilding the reference, and comparing. CPU seconds are compared twice: ours of that
span with those of the tool's whole process, which loads and warms up in it, and process with
process, where ours starts Python and imports. Writes benchmarks/results/perplexity.json, where the
rows of models that are not run stay, and prints the tables.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.paths import RESULTS, ROOT
from benchmarks.peers.llama_perplexity import VERSION, LlamaPerplexity, build
from benchmarks.perplexity.compare import compare_variant
from benchmarks.perplexity.disk import bytes_by_sizes, measure_disk
from benchmarks.perplexity.project import BASE, make_project, store_reference
from benchmarks.random_models import write_shallow_llama
from quantline.files import read_json, write_json
from quantline.model.gguf_files import model_files
from quantline.paths import EXPORTS

DEMO_VARIANTS = {"gguf-q8_0": "q8_0", "gguf-q4_k_m": "q4_k_m", "gguf-q2_k": "q2_k"}
RANDOM_VARIANTS = {"gguf-q8_0": "q8_0"}
RANDOM_CHUNKS = 2
TEXT = ROOT / "demo/data/evaluation.txt"
TITLES = ("figure", "ours", "±", "tool", "±", "difference", "bound", "within")

Results = dict[str, Any]


def measure_model(
    tool: LlamaPerplexity,
    model: Path,
    variants: dict[str, str],
    chunks: int,
    options: argparse.Namespace,
    keep: Callable[[Results], None],
) -> None:
    """Measure the variants of one model.

    Args:
        tool: llama-perplexity.
        model: The checkpoint.
        variants: Name → its recipe.
        chunks: Of the text.
        options: Of the command line.
        keep: Called with the results so far after each variant.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        project = options.project
        if project is None:
            project = folder / "project"
            project.mkdir()
            make_project(project, model, variants, options.threads)
        logits = folder / "logits"
        base = model_files(project / EXPORTS / BASE)[0]
        run = tool.run(base, logits, "--file", str(TEXT), "--chunks", str(chunks))
        reference = store_reference(project, logits, folder / "reference")
        results: Results = {
            "tokens": int(reference.tokens.size),
            "scored": reference.scored,
            "disk": measure_disk(logits, reference),
            "tool_base_run": run.costs,
            "variants": {},
        }
        for name in variants:
            bundle = project / EXPORTS / name
            results["variants"][name] = compare_variant(
                tool, bundle, logits, reference, options.repetitions
            )
            keep(results)


def print_results(name: str, results: Results, console: Console) -> None:
    """Print the tables of one model."""
    for variant, row in results["variants"].items():
        title = f"{name}, {variant}: {results['scored']} of {results['tokens']} tokens scored"
        table = Table(*TITLES, box=None, title=title)
        for figure, sides in row["figures"].items():
            ours_error = f"{sides['ours_se']:.2g}" if "ours_se" in sides else ""
            tool_error = f"{sides['tool_se']:.2g}" if "tool_se" in sides else ""
            table.add_row(
                figure,
                f"{sides['ours']:.7f}",
                ours_error,
                f"{sides['tool']:.7f}",
                tool_error,
                f"{sides['difference']:+.1e}",
                f"{sides['bound']:.1e}",
                "yes" if sides["within"] else "NO",
            )
        console.print(table)
        times = [
            f"{side}: {costs['seconds']:.2f} s, {costs['cpu_s']:.2f} s of CPU, "
            f"{costs['peak_mib']:.0f} MiB;"
            for side, costs in row["times"].items()
        ]
        ratios = (
            f"ratio {row['ratio']:.2f}, of CPU {row['cpu_ratio']:.2f}, of the processes' "
            f"{row['cpu_ratio_processes']:.2f}; with all positions "
            f"{row['ratio_all_positions']:.2f}"
        )
        console.print(*times, ratios)
    console.print(f"disk, {name}: {results['disk']}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--source", type=Path, help="an unpacked source distribution of llama-cpp-python"
    )
    parser.add_argument("--tool", type=Path, help="a llama-perplexity that is there already")
    parser.add_argument(
        "--models",
        nargs="*",
        default=["demo", "131072", "262144"],
        help="demo, or the vocabularies of random models",
    )
    parser.add_argument(
        "--project",
        type=Path,
        help="the project of an earlier run of one model, whose exports are used again",
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2048, help="tokens that the tool runs at once")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    """Measure every model. Rows of the results that are not measured again stay."""
    options = parse_options()
    console = Console(width=120)
    program = options.tool or build(options.source)
    tool = LlamaPerplexity(program, options.length, options.threads, options.batch)
    path = RESULTS / "perplexity.json"
    results: Results = read_json(path) if path.is_file() else {"models": {}}
    results["calculated"] = bytes_by_sizes()
    settings = {
        "threads": options.threads,
        "batch": options.batch,
        "tool": f"llama-cpp-python {VERSION}",
        "repetitions": options.repetitions,
    }
    for name in options.models:

        def keep(measured: Results, name: str = name) -> None:
            results["models"][name] = settings | measured
            write_json(path, results)

        if name == "demo":
            model = ROOT / "demo/model"
            measure_model(tool, model, DEMO_VARIANTS, options.chunks, options, keep)
        else:
            with tempfile.TemporaryDirectory() as folder:
                model = Path(folder) / "model"
                write_shallow_llama(model, int(name))
                measure_model(tool, model, RANDOM_VARIANTS, RANDOM_CHUNKS, options, keep)
        print_results(name, results["models"][name], console)


if __name__ == "__main__":
    main()
