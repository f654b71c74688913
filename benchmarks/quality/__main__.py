"""Mean KL divergence and time of our recipes beside other tools', on the same tokens, in one run.

    python -m benchmarks.quality                # the demo model, all tools; hours on two cores
    python -m benchmarks.quality --bits 3 --groups 128 --peers autoround
    python -m benchmarks.quality --model /path --calibration a.txt --evaluation b.txt
    python -m benchmarks.quality --peers-of benchmarks/results/quality-… # ours alone, beside those
    python -m benchmarks.quality --draws 6 --only gptq 'llmcompressor gptq'  # how much is chance

Each tool runs in an environment of its own, made on first use under ~/.cache/quantline-peers.
Writes benchmarks/results/quality-<model>[-<name>].json and prints the table.
"""

import argparse
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.model_under_test import ModelUnderTest, add_model_options
from benchmarks.paths import RESULTS
from benchmarks.quality.our_recipes import our_recipes
from benchmarks.quality.peers import PEERS, run_peer
from benchmarks.quality.ratios import average_draws, compare_with_peers
from benchmarks.tables import number_table
from quantline.files import read_json, write_json

# Recipes whose kernels are all that the others use: one run of each compiles everything.
WARM_UP = ("awq", "gptq", "gptq + curvature")


def run_recipe(
    model: ModelUnderTest, recipe: dict[str, Any], calibration: Path
) -> dict[str, float]:
    """Return the divergence of one of our recipes, and the seconds that it takes.

    Args:
        model: What to quantize.
        recipe: Its options.
        calibration: The folder of its calibration.
    """
    with tempfile.TemporaryDirectory() as folder:
        times = model.quantize(recipe, calibration, Path(folder))
        return model.quantized_divergence(Path(folder)) | times


class QualityBenchmark:
    """The rows measured so far, each of one recipe or tool on one grid.

    Attributes:
        rows: With the keys bits, group_size, draw and who, then what was measured.
        calibrations: For each draw, our calibration's seconds.
    """

    def __init__(self, model: ModelUnderTest, options: argparse.Namespace) -> None:
        """Take the model and the options of the command line."""
        self.model = model
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.calibrations: list[dict[str, float]] = []

    def is_wanted(self, name: str) -> bool:
        """Whether the options ask for a row of the table."""
        return not self.options.only or name in self.options.only

    def measure_draw(self, number: int, console: Console) -> None:
        """Calibrate on one draw, and measure everything on every grid."""
        self.model.calibration = self.model.draws[number]
        with tempfile.TemporaryDirectory() as folder:
            calibration = Path(folder) / "calibration"
            self.calibrations.append(self.model.calibrate(calibration, gradients=True))
            recipes = our_recipes(4, self.options.groups[0])
            warms_up = self.options.warm_up and any(map(self.is_wanted, recipes))
            if warms_up and not self.rows:
                for name in WARM_UP:
                    run_recipe(self.model, recipes[name], calibration)
            for bits, group_size in product(self.options.bits, self.options.groups):
                self.measure_grid(number, bits, group_size, calibration)
                console.print(quality_table(average_draws(self.rows), list(self.model.tokens_of)))
                write_json(self.path, self.report())

    def measure_grid(self, draw: int, bits: int, group_size: int, calibration: Path) -> None:
        """Measure our recipes and the other tools on one grid."""
        grid = {"bits": bits, "group_size": group_size, "draw": draw}
        for name, recipe in our_recipes(bits, group_size).items():
            if self.is_wanted(name):
                measured = run_recipe(self.model, recipe, calibration)
                self.rows.append(grid | {"who": name} | measured)
        if self.options.peers_of:
            self.rows += rows_of_peers(self.options.peers_of, self.report(), grid)
            return
        for peer, method in PEERS:
            name = f"{peer} {method}"
            if peer in self.options.peers and self.is_wanted(name):
                minutes = self.options.peer_minutes
                outcome = run_peer(self.model, peer, method, bits, group_size, minutes)
                self.rows.append(grid | {"who": name} | outcome)

    @property
    def path(self) -> Path:
        """The file of the results."""
        suffix = "-draws" if self.options.draws > 1 else ""
        suffix += f"-{self.options.name}" if self.options.name else ""
        return RESULTS / f"quality-{self.model.name}{suffix}.json"

    def report(self) -> dict[str, Any]:
        """Return the content of that file."""
        return {
            "model": self.model.name,
            "calibration_tokens": int(self.model.calibration.size),
            "calibration_seconds": self.calibrations[0],
            "evaluation_tokens": self.model.tokens_of,
            "threads": os.cpu_count(),
            "draws": len(self.model.draws),
            "rows": self.rows,
            "ratios": self.ratios(),
        }

    def ratios(self) -> dict[str, float]:
        """Return what is compared → our figure over the other tool's."""
        return dict(compare_with_peers(average_draws(self.rows), self.calibrations[0]))


def rows_of_peers(path: Path, report: dict[str, Any], grid: dict[str, int]) -> list[dict[str, Any]]:
    """Return the rows of other tools on a grid from an earlier run's file.

    Args:
        path: The file.
        report: Of this run.
        grid: With bits, group_size and draw.

    Raises:
        SystemExit: If that run had other tokens.
    """
    earlier = read_json(path)
    for key in ("model", "calibration_tokens", "evaluation_tokens"):
        if earlier[key] != report[key]:
            raise SystemExit(f"expected {key} {report[key]} in {path}, found {earlier[key]}")
    names = {f"{peer} {method}" for peer, method in PEERS}
    return [row for row in earlier["rows"] if row["who"] in names and grid.items() <= row.items()]


def quality_table(rows: list[dict[str, Any]], texts: list[str]) -> Table:
    """Return the table, with the divergence on each text.

    A tool's seconds include its calibration; ours are given apart.
    """
    cells = []
    for row in rows:
        if "failed" in row:
            figures = ["failed: " + row["failed"][:60], *[""] * len(texts)]
        else:
            of_texts = (row["texts"][text] for text in texts)
            figures = [f"{of_text['kld']:.5f} ± {of_text['se']:.5f}" for of_text in of_texts]
            figures.append(f"{row['seconds']:.1f}")
        cells.append([str(row["bits"]), str(row["group_size"]), row["who"], *figures])
    titles = ("bits", "group", "recipe or tool", *texts, "seconds")
    return number_table(titles, cells)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    add_model_options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--peers", nargs="*", default=sorted({peer for peer, _ in PEERS}))
    parser.add_argument(
        "--only",
        nargs="+",
        help="the recipes to run, as the table names them: gptq 'llmcompressor gptq'",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=1,
        help="neighbouring parts of the calibration text to calibrate on in turn",
    )
    parser.add_argument(
        "--peer-minutes", type=float, default=120, help="after which another tool is stopped"
    )
    parser.add_argument(
        "--peers-of", type=Path, help="results of an earlier run, whose other tools are not run"
    )
    parser.add_argument("--name", help="of this run, in the name of the results")
    parser.add_argument(
        "--no-warm-up",
        dest="warm_up",
        action="store_false",
        help="where an earlier run has compiled all kernels",
    )
    return parser.parse_args()


def main() -> None:
    """Measure every draw, and print the tables and the ratios."""
    options = parse_options()
    console = Console()
    torch.set_num_threads(os.cpu_count() or 1)
    model = ModelUnderTest.of_options(options, options.draws)
    benchmark = QualityBenchmark(model, options)
    for number in range(len(model.draws)):
        benchmark.measure_draw(number, console)
    for label, ratio in benchmark.ratios().items():
        console.print(f"{ratio:8.4f}  {label}", highlight=False)
    console.print(f"our calibration: {benchmark.calibrations[0]['seconds']:.1f} s")


if __name__ == "__main__":
    main()
