"""Quantizing by workers: the same bytes as by one process."""

import random
import threading

import psutil
import pytest

from quantline.calibration.store import CalibrationStore
from quantline.config.executor import Executor
from quantline.config.recipes import parse_recipe
from quantline.errors import Failure, StageError
from quantline.executor.run_items import run_items
from quantline.files import sha256_files
from quantline.model.checkpoint import Checkpoint
from quantline.recipes import shared_inputs
from quantline.recipes.quantize import quantize_model
from tests.helpers.calibrated import calibrate_into
from tests.helpers.models import write_model
from tests.helpers.quantized import tokens_of

GRID = {"bits": 4, "group_size": 32, "symmetric": False}
RECIPES = {
    "rtn": {"method": "rtn", **GRID},
    "gptq": {"method": "gptq", **GRID},
    "awq": {"method": "awq", **GRID},
    "kquant": {"method": "kquant", "mix": "Q8_0", "importance": False},
    "kquant-curvature": {"method": "kquant-curvature", "mix": "Q8_0"},
    "gptq-budget": {"method": "gptq", **GRID, "budget": {"bits_per_weight": 9}},
}
QUICK = ("rtn", "kquant")  # those that compile nothing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(checkpoint, its calibration)."""
    folder = tmp_path_factory.mktemp("workers")
    checkpoint = Checkpoint(
        write_model(
            folder / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=3, seed=2
        )
    )
    return checkpoint, calibrate_into(folder / "calibration", checkpoint, tokens_of(checkpoint))


def digest(folder) -> str:
    return sha256_files(folder, sorted(folder.rglob("*.*")))


def quantize(model, name: str, folder, executor: Executor | None = None) -> str:
    """Quantize into a new folder; return the digest of all its files."""
    folder.mkdir()
    checkpoint, calibration = model
    store = CalibrationStore(calibration.folder)
    quantize_model(name, parse_recipe(RECIPES[name]), checkpoint, store, folder, executor)
    return digest(folder)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES],
)
def test_quantize_by_workers_makes_the_same_bytes(model, tmp_path, workers_here, name):
    alone = quantize(model, name, tmp_path / "alone")
    lost_sometimes = workers_here(lambda number: number % 3 == 1)
    executor = Executor(workers=2, attempts=9)
    assert quantize(model, name, tmp_path / "workers", executor) == alone
    assert lost_sometimes[0].started


def test_quantize_by_workers_goes_on_with_the_parts_that_are_missing(
    model, tmp_path, workers_here, monkeypatch
):
    alone = quantize(model, "kquant", tmp_path / "alone")
    folder = tmp_path / "workers"
    given = []

    def stop_after_two(executor, items, folder, take, *labels):
        given.append([item.arguments["part"] for item in items])

        def take_some(item, made):
            if len(list(folder.glob("*.json"))) == 2:
                raise KeyboardInterrupt
            take(item, made)

        run_items(executor, items, folder, take_some if len(given) == 1 else take, *labels)

    workers_here()
    monkeypatch.setattr("quantline.recipes.block_items.run_items", stop_after_two)
    executor = Executor(workers=2)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "kquant", folder, executor)
    recipe = parse_recipe(RECIPES["kquant"])
    quantize_model("kquant", recipe, *model, folder, executor)
    # What lies outside the blocks comes first.
    assert given[0] == ["rest", *(f"block-{layer:03d}" for layer in range(3))]
    assert given[1] == [f"block-{layer:03d}" for layer in range(1, 3)]
    assert digest(folder) == alone


def test_open_shared_refuses_what_the_stage_did_not_see(model, tmp_path, workers_here, monkeypatch):
    workers_here()
    inputs_key = shared_inputs.inputs_key
    calls = []

    def other_on_the_worker(*arguments):
        calls.append(arguments)
        return inputs_key(*arguments) | ({"versions": {"torch": "1"}} if len(calls) > 1 else {})

    monkeypatch.setattr(shared_inputs, "inputs_key", other_on_the_worker)
    shared_inputs._opened.cache_clear()
    with pytest.raises(StageError, match=r"expected on \S+ the versions of the stage") as caught:
        quantize(model, "rtn", tmp_path / "workers", Executor(workers=2))
    assert caught.value.failure is Failure.ARTIFACT_CHANGED


def kill_workers(over: threading.Event, killed: list[int]) -> None:
    """Kill a random worker now and then."""
    choice = random.Random(0)
    while not over.wait(choice.uniform(2, 6)):
        workers = []
        for process in psutil.Process().children(recursive=True):
            with_name = "quantline.executor.worker" in " ".join(process.cmdline())
            workers += [process] if with_name else []
        if workers and len(killed) < 6:
            chosen = choice.choice(workers)
            chosen.kill()
            killed.append(chosen.pid)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("name", ["gptq", "kquant-curvature"])
def test_processes_make_the_same_bytes(model, tmp_path, name, workers):
    alone = quantize(model, name, tmp_path / "alone")
    assert quantize(model, name, tmp_path / "w", Executor(workers=workers)) == alone


@pytest.mark.slow
def test_processes_that_are_killed_make_the_same_bytes(model, tmp_path):
    alone = quantize(model, "awq", tmp_path / "alone")
    over, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(over, killed))
    killer.start()
    try:
        made = quantize(model, "awq", tmp_path / "w", Executor(workers=2, attempts=100))
    finally:
        over.set()
        killer.join()
    assert made == alone
