"""Measuring a bundle by workers: parts of the evaluation text, and the questions.

Each part has whole batches of the runtime, so its tokens have the values that they have in the
whole text. Speed is measured first, by the stage itself, while no worker is there.
"""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file

from quantline.config.executor import Executor
from quantline.config.texts import Limits, Speed
from quantline.errors import Failure, StageError
from quantline.executor.agreement import check_agreement, digests
from quantline.executor.item import Item
from quantline.executor.run_items import run_items
from quantline.files import read_json, stamp, versions, write_json
from quantline.messages import say
from quantline.metrics.gold_set import GoldResult
from quantline.metrics.measure import TOKENS
from quantline.metrics.measuring_process import Measuring
from quantline.metrics.quality import quality_figures
from quantline.metrics.token_values import TokenValues
from quantline.run.code_digest import code_digest

ANSWERS = "answers.json"
PACKAGES = ("torch", "numpy", "transformers", "llama-cpp-python", "onnxruntime")


def measure_by_workers(
    measuring: Measuring, speed: Speed, executor: Executor, folder: Path
) -> dict[str, Any]:
    """Measure a bundle, by workers.

    Args:
        measuring: The bundle.
        speed: How speed is measured.
        executor: Who works.
        folder: For what workers make; it is gone at the end.

    Returns:
        {quality, items, speed, runtime_version}, as `measure_in_child` does.

    Raises:
        StageError: As `measure_in_child` and `run_items` do.
    """
    measured = measuring.call("measure_serving", speed=speed.model_dump())
    runtime = {
        "runtime_version": measured["runtime_version"],
        "device": measured["speed"]["device"],
    }
    if runtime["device"] != "cpu" and not executor.gpus:
        # Several would share the GPU that this machine has, or have none.
        say(
            f"{measuring.bundle.name}: one worker of this machine measures it, since "
            f"{measuring.runtime} runs on {runtime['device']} and executor.gpus is 0"
        )
        executor = Executor(attempts=executor.attempts)
    shared = {
        **runtime,
        "bundle": str(measuring.bundle.resolve()),
        "runtime": measuring.runtime,
        "reference": str(measuring.reference.resolve()),
        "limits": measuring.limits.model_dump(),
        "python": measuring.python,
        "key": digests(_inputs(measuring)),
    }
    parts = min(executor.workers, _sequences(measuring.reference))
    asked = (measuring.reference / "gold.jsonl").stat().st_size > 0
    label = f"of {measuring.bundle.name}"
    items = []
    if asked:
        items.append(Item(f"the questions {label}", "ask_questions", {"shared": shared}))
    for number in range(parts):
        arguments = {"shared": shared, "part": [number, parts]}
        items.append(Item(f"part {number + 1} of {parts} {label}", "measure_text_part", arguments))
    values: dict[int, TokenValues] = {}
    results: list[GoldResult] = []

    def take(item: Item, made: Path) -> None:
        if item.function == "ask_questions":
            answers = read_json(made / ANSWERS)["results"]
            results.extend(GoldResult(**row) for row in answers)
        else:
            values[item.arguments["part"][0]] = TokenValues(**load_file(made / TOKENS))

    run_items(executor, items, folder, take, f"measuring {measuring.bundle.name}", "part")
    shutil.rmtree(folder, ignore_errors=True)  # NFS may hold a file that was open
    tokens = TokenValues.join([values[number] for number in range(parts)])
    quality, answers = quality_figures(tokens, results, measuring.reference)
    return {"quality": quality, "items": answers, **measured}


def measure_text_part(shared: dict[str, Any], part: list[int], folder: Path) -> None:
    """Measure a part of the text in a fresh process, as a worker does it.

    Args:
        shared: What the parts have in common.
        part: Its number, and of how many.
        folder: For the result.

    Raises:
        StageError: artifact_changed, if this machine does not see what the stage sees; as
            `Measuring.call` does.
    """
    measuring = _open(shared)
    where = str(folder.resolve())
    _check_runtime(
        shared, measuring.call("measure_part", part=part, threads=_threads(), folder=where)
    )


def ask_questions(shared: dict[str, Any], folder: Path) -> None:
    """Ask the gold set in a fresh process, as a worker does it. As `measure_text_part`."""
    answers = _open(shared).call("measure_gold", threads=_threads())
    _check_runtime(shared, answers)
    write_json(folder / ANSWERS, answers)


def _open(shared: dict[str, Any]) -> Measuring:
    measuring = Measuring(
        Path(shared["bundle"]),
        shared["runtime"],
        Path(shared["reference"]),
        Limits(**shared["limits"]),
        shared["python"],
    )
    check_agreement(shared["key"], _inputs(measuring))
    return measuring


def _check_runtime(shared: dict[str, Any], answer: dict[str, Any]) -> None:
    """Check that a worker's runtime is the one whose speed the stage has measured.

    Raises:
        StageError: artifact_changed.
    """
    for what in ("runtime_version", "device"):
        if answer[what] != shared[what]:
            raise StageError(
                Failure.ARTIFACT_CHANGED,
                f"expected the {what} {shared[what]} of {shared['runtime']} with the worker on "
                f"{socket.gethostname()}, found {answer[what]}; give all machines the same "
                "packages, and the workers the same kind of device",
            )


def _sequences(reference: Path) -> int:
    """Return how many sequences the evaluation text has."""
    with safe_open(reference / "hidden.safetensors", "np") as file:
        return file.get_slice("tokens").get_shape()[0]


def _inputs(measuring: Measuring) -> dict[str, Any]:
    """Return what the figures of a part depend on, besides the item's own words."""
    return {
        "bundle": stamp(path for path in measuring.bundle.iterdir() if path.is_file()),
        "reference": stamp(path for path in measuring.reference.iterdir() if path.is_file()),
        "versions": versions(*PACKAGES),
        "code": code_digest("evaluate"),
    }


def _threads() -> int | None:
    """Return how many threads this worker has, as quantline/executor/workers.py says it."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() else None
