"""Quantizing by several workers: the same bytes as by one process, also under kills, and the time.

    python -m benchmarks.executors                              # the demo model, processes
    python -m benchmarks.executors --executor ray               # the same by Ray, started here
    python -m benchmarks.executors --executor slurm             # by submitit's jobs on this machine
    python -m benchmarks.executors --kill-every 2               # a random worker is killed so often
    python -m benchmarks.executors --model /tmp/smollm2/model --calibration … --workers 1 2

Every worker has one thread. Each recipe is quantized once by this process and once for each number
of workers, and the sha256 over all files is compared. Seconds are those of the whole, with the
start of the workers. Writes benchmarks/results/executors-<model>-<executor>.json, and prints the
table.
"""

import argparse
import os
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from rich.console import Console

from benchmarks.calibration import calibrate
from benchmarks.model_under_test import add_model_options, read_paragraphs
from benchmarks.paths import RESULTS
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.calibration.store import CalibrationStore
from quantline.config.executor import Executor
from quantline.config.recipes import parse_recipe
from quantline.files import sha256_files, write_json
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.quantize import quantize_model
from quantline.text.tokenizer import Tokenizer

GRID = {"bits": 4, "group_size": "auto", "symmetric": "auto"}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", **GRID},
    "gptq": {"method": "gptq", **GRID},
    "awq": {"method": "awq", **GRID},
    "kquant": {"method": "kquant", "mix": "Q4_K_M"},
    "kquant-curvature": {"method": "kquant-curvature", "mix": "Q4_K_M"},
    "gptq-budget": {"method": "gptq", **GRID, "budget": {"bits_per_weight": 6}},
}
# A part of the command line of a worker, as the system shows it.
MARKS = {"local": "quantline.executor.worker", "ray": "ray::work", "slurm": "executor.worker"}
ATTEMPTS = 1000  # as often as workers are killed
FIELDS: dict[str, dict[str, Any]] = {
    "local": {},
    "ray": {},
    "slurm": {"cluster": "local", "minutes": 60},
}


class Killer(threading.Thread):
    """Kills a random worker again and again.

    Attributes:
        killed: How many it has killed.
    """

    def __init__(self, mark: str, every_s: float, seed: int) -> None:
        """Say whom to kill, and how often."""
        super().__init__(daemon=True)
        self.killed = 0
        self._mark = mark
        self._every_s = every_s
        self._random = random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        """Kill until `end`."""
        while not self._over.wait(self._random.uniform(0.5, 1.5) * self._every_s):
            workers = []
            for process in psutil.Process().children(recursive=True):
                try:
                    command = process.cmdline()
                except psutil.NoSuchProcess:
                    continue
                # Not `env`, nor what submitit starts, which have the mark further on.
                if any(self._mark in part for part in command[:5]) and command[0] != "env":
                    workers.append(process)
            if workers:
                self._random.choice(workers).kill()
                self.killed += 1

    def end(self) -> None:
        """Kill nobody any more."""
        self._over.set()
        self.join()


def measure(
    options: dict[str, Any],
    checkpoint: Checkpoint,
    calibration: Path,
    executor: Executor | None,
    kill_every: float | None,
) -> dict[str, Any]:
    """Quantize once; return sha256, seconds, and how many workers were killed."""
    killer = None
    with tempfile.TemporaryDirectory() as folder:
        if executor is not None and kill_every:
            killer = Killer(MARKS[executor.kind], kill_every, executor.workers)
            killer.start()
        with stopwatch() as times:
            store = CalibrationStore(calibration)
            recipe = parse_recipe(options)
            quantize_model("benchmark", recipe, checkpoint, store, Path(folder), executor)
        if killer is not None:
            killer.end()
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        digest = sha256_files(Path(folder), files)
    return {
        "sha256": digest,
        "seconds": times["seconds"],
        "killed": killer.killed if killer is not None else 0,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--executor", choices=sorted(FIELDS), default="local")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 7])
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument("--kill-every", type=float, help="seconds")
    options = parser.parse_args()
    folder = options.model.resolve()
    name = f"{folder.parent.name}-{folder.name}"
    kills = "-kills" if options.kill_every else ""
    target = RESULTS / f"executors-{name}-{options.executor}{kills}.json"
    checkpoint = Checkpoint(options.model)
    tokens = Tokenizer(options.model).pack(
        read_paragraphs(options.calibration), options.sequences[0], options.length
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        calibration = Path(temporary) / "calibration"
        calibrate(checkpoint, tokens, calibration, True)
        for recipe in options.recipes:
            one = measure(RECIPES[recipe], checkpoint, calibration, None, None)
            rows.append({"recipe": recipe, "workers": 0, "load": os.getloadavg()[0], **one})
            for workers in options.workers:
                executor = Executor(
                    kind=options.executor,
                    workers=workers,
                    threads=1,
                    attempts=ATTEMPTS,
                    **FIELDS[options.executor],
                )
                if not executor.divides:
                    continue
                row = measure(
                    RECIPES[recipe], checkpoint, calibration, executor, options.kill_every
                )
                row["same"] = row["sha256"] == one["sha256"]
                rows.append(
                    {"recipe": recipe, "workers": workers, "load": os.getloadavg()[0], **row}
                )
                write_json(target, rows)
    cells = []
    for row in rows:
        same = "–" if row["workers"] == 0 else "yes" if row["same"] else "NO"
        cells.append(
            [
                row["recipe"],
                str(row["workers"] or "this process"),
                f"{row['seconds']:.1f}",
                same,
                str(row["killed"]),
                f"{row['load']:.1f}",
            ]
        )
    titles = ("recipe or tool", "workers", "seconds", "same bytes", "killed", "load")
    Console().print(number_table(titles, cells))
    raise SystemExit(not all(row.get("same", True) for row in rows))


if __name__ == "__main__":
    main()
