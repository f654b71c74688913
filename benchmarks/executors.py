"""Stages by several workers: the same bytes as by one process, also under kills, and the time.

    python -m benchmarks.executors                              # the demo model, processes
    python -m benchmarks.executors --executor ray               # the same by Ray, started here
    python -m benchmarks.executors --executor slurm             # by submitit's jobs on this machine
    python -m benchmarks.executors --kill-every 2               # a random worker is killed so often
    python -m benchmarks.executors --model /tmp/smollm2/model --calibration … --workers 1 2
    python -m benchmarks.executors --works calibrate evaluate    # these alone

Every worker has one thread. The model is calibrated, quantized by each recipe, and its full
precision measured in transformers, once by one process and once for each number of workers, and
the sha256 over all files (or figures) is compared. Seconds are those of the whole, with the start
of the workers. Writes benchmarks/results/executors-<model>-<executor>.json, and prints the
table.
"""

import argparse
import os
import random
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
from rich.console import Console

from benchmarks.calibration import SEED, calibrate
from benchmarks.model_under_test import add_model_options, read_paragraphs
from benchmarks.paths import RESULTS
from benchmarks.reference import write_hidden_reference
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.calibration.collect import collect_statistics, remove_progress
from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.parts import collect_by_workers, remove_parts
from quantline.calibration.store import CalibrationStore
from quantline.config.executor import Executor
from quantline.config.recipes import parse_recipe
from quantline.config.texts import Limits, Speed
from quantline.files import sha256_files, write_json
from quantline.metrics.measure_items import measure_by_workers
from quantline.metrics.measuring_process import Measuring, measure_in_child
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
WORKS = ["calibrate", *sorted(RECIPES), "evaluate"]
SPEED = Speed(prompt_tokens=8, new_tokens=2, repetitions=1, threads=1)  # hardly any time
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


class Works:
    """What a model goes through: each work takes an executor and an empty folder.

    Its result is what lies in the folder afterwards.
    """

    def __init__(self, model: Path, tokens: list[np.ndarray], folder: Path) -> None:
        """Make what the works begin with.

        Args:
            model: Folder of the checkpoint.
            tokens: Of calibration and of evaluation, int32 [sequences, length] each.
            folder: For calibration and reference.
        """
        self.checkpoint = Checkpoint(model)
        self.tokens, evaluation = tokens
        self.calibration = folder / "calibration"
        calibrate(self.checkpoint, self.tokens, self.calibration, True)
        self.reference = write_hidden_reference(self.checkpoint, evaluation, folder / "reference")
        (self.reference / "gold.jsonl").touch()

    def calibrate(self, executor: Executor | None, folder: Path) -> None:
        """Sum up the calibration text."""
        arguments = (self.checkpoint, self.tokens, folder, SEED, True)
        if executor:
            collect_by_workers(*arguments, executor)
            remove_parts(folder)
            (folder / TOKENS).unlink()
        else:
            collect_statistics(*arguments)
            remove_progress(folder)

    def evaluate(self, executor: Executor | None, folder: Path) -> None:
        """Measure full precision."""
        bundle = self.checkpoint.folder
        measuring = Measuring(bundle, "transformers", self.reference, Limits())
        if executor:
            measured = measure_by_workers(measuring, SPEED, executor, folder / "made")
        else:
            measured = measure_in_child(measuring, SPEED)
        write_json(folder / "quality.json", measured["quality"])

    def quantize(self, recipe: str, executor: Executor | None, folder: Path) -> None:
        """Quantize by a recipe."""
        store = CalibrationStore(self.calibration)
        options = parse_recipe(RECIPES[recipe])
        quantize_model("benchmark", options, self.checkpoint, store, folder, executor)

    def named(self, name: str) -> Callable[[Executor | None, Path], None]:
        """Return a work by its name."""
        if name in RECIPES:
            return partial(self.quantize, name)
        return self.calibrate if name == "calibrate" else self.evaluate


def measure(
    work: Callable[[Executor | None, Path], None],
    executor: Executor | None,
    kill_every: float | None,
) -> dict[str, Any]:
    """Work once; return sha256, seconds, and how many workers were killed."""
    killer = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if executor is not None and kill_every:
            killer = Killer(MARKS[executor.kind], kill_every, executor.workers)
            killer.start()
        with stopwatch() as times:
            work(executor, folder)
        if killer is not None:
            killer.end()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digest = sha256_files(folder, files)
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
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--kill-every", type=float, help="seconds")
    options = parser.parse_args()
    folder = options.model.resolve()
    name = f"{folder.parent.name}-{folder.name}"
    kills = "-kills" if options.kill_every else ""
    target = RESULTS / f"executors-{name}-{options.executor}{kills}.json"
    tokenizer = Tokenizer(options.model)
    texts = zip((options.calibration, options.evaluation[0]), options.sequences, strict=True)
    tokens = [tokenizer.pack(read_paragraphs(path), count, options.length) for path, count in texts]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        works = Works(options.model, tokens, Path(temporary))
        for named in options.works:
            work = works.named(named)
            one = measure(work, None, None)
            rows.append({"work": named, "workers": 0, "load": os.getloadavg()[0], **one})
            for workers in options.workers:
                executor = Executor(
                    kind=options.executor,
                    workers=workers,
                    threads=1,
                    attempts=ATTEMPTS,
                    **FIELDS[options.executor],
                )
                row = measure(work, executor, options.kill_every)
                row["same"] = row["sha256"] == one["sha256"]
                load = os.getloadavg()[0]
                rows.append({"work": named, "workers": workers, "load": load, **row})
                write_json(target, rows)
    cells = []
    for row in rows:
        same = "–" if row["workers"] == 0 else "yes" if row["same"] else "NO"
        cells.append(
            [
                row["work"],
                str(row["workers"] or "this process"),
                f"{row['seconds']:.1f}",
                same,
                str(row["killed"]),
                f"{row['load']:.1f}",
            ]
        )
    titles = ("work", "workers", "seconds", "same bytes", "killed", "load")
    Console().print(number_table(titles, cells))
    raise SystemExit(not all(row.get("same", True) for row in rows))


if __name__ == "__main__":
    main()
