"""Statistics by workers: the same bytes as by one process."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from quantline.calibration import calibrate, parts, sums
from quantline.calibration.block_files import INPUTS, BlockWriter
from quantline.calibration.calibrate import CalibrationRun
from quantline.calibration.collect import collect_statistics
from quantline.calibration.input_moments import InputSums
from quantline.calibration.parts import collect_by_workers
from quantline.config.executor import Executor
from quantline.config.texts import Calibration
from quantline.errors import Failure, StageError
from quantline.executor.run_items import run_items
from quantline.files import as_json
from quantline.model import block_runner
from quantline.model.checkpoint import Checkpoint
from tests.helpers.models import write_model
from tests.helpers.quantized import tokens_of

SUFFIX = ".safetensors"
TWO = Executor(workers=2, attempts=9)
KINDS = {
    "forward alone": (None, False),
    "gradients": (3, False),
    "tokens by gradients": (3, True),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch) -> None:
    """Two sequences of 20 tokens in a batch."""
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 40)
    parts._opened.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return Checkpoint(write_model(tmp_path_factory.mktemp("parts") / "model", **sizes))


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Empty folders: for one process, and for workers."""
    made = tmp_path / "alone", tmp_path / "workers"
    for folder in made:
        folder.mkdir()
    return made


def statistics(folder) -> dict[str, bytes]:
    """Return the bytes of all files of a calibration."""
    names = ("inputs-*", "weighted-*", "outputs-*", "final*", "embedding*")
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


@pytest.mark.parametrize("seed, weighted", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("sequences", [5, 37])  # 3 parts of a batch; 8 parts of 2 or 3 batches
def test_statistics_by_workers_are_the_same_bytes(
    checkpoint, folders, workers_here, seed, weighted, sequences
):
    tokens = tokens_of(checkpoint, sequences, 20)
    alone, by_workers = folders
    layers = collect_statistics(checkpoint, tokens, alone, seed, weighted)
    used = workers_here(lambda number: number % 3 == 1)
    found = collect_by_workers(checkpoint, tokens, by_workers, seed, weighted, TWO)
    assert as_json(found) == as_json(layers)
    files = statistics(alone)
    assert statistics(by_workers) == files
    assert len(files) == 2 * (1 + (seed is not None) + weighted) + 1 + (seed is not None)
    assert all(crew.started for crew in used)


def test_inputs_that_overflow_count_the_same(checkpoint, folders, workers_here, monkeypatch):
    """In one part of the text, in all of a batch."""
    tokens = tokens_of(checkpoint, 8, 20)
    embed = block_runner.BlockRun._embed

    def overflowing(run, recorder, batch):
        record = embed(run, recorder, batch)
        where = (batch.cpu().numpy() == tokens[3]).all(1)
        record.entered[where] = np.inf
        return record

    monkeypatch.setattr(block_runner.BlockRun, "_embed", overflowing)
    alone, by_workers = folders
    layers = collect_statistics(checkpoint, tokens, alone, 1, True)
    workers_here()
    assert collect_by_workers(checkpoint, tokens, by_workers, 1, True, TWO) == layers
    assert statistics(by_workers) == statistics(alone)
    assert layers["model.layers.0.mlp.up_proj"]["not_finite"] == 20


def test_a_model_that_overflows_everywhere_is_refused(
    checkpoint, tmp_path, workers_here, monkeypatch
):
    embed = block_runner.BlockRun._embed

    def overflowing(run, recorder, batch):
        record = embed(run, recorder, batch)
        record.entered.fill_(np.nan)
        return record

    monkeypatch.setattr(block_runner.BlockRun, "_embed", overflowing)
    workers_here()
    with pytest.raises(StageError, match="overflows on the calibration text") as caught:
        collect_by_workers(checkpoint, tokens_of(checkpoint, 4, 20), tmp_path, None, False, TWO)
    assert caught.value.failure is Failure.NON_FINITE


@pytest.mark.parametrize("killed_in", ["calibrating", "merging"])
def test_a_killed_run_goes_on_with_what_is_missing(
    checkpoint, folders, workers_here, monkeypatch, killed_in
):
    tokens = tokens_of(checkpoint, 6, 20)
    alone, by_workers = folders
    collect_statistics(checkpoint, tokens, alone, 1, True)
    given: list[tuple[str, int]] = []

    def stopping(executor, items, folder, take, label, unit):
        given.append((label, len(items)))
        taken: list[str] = []

        def take_one(item, made):
            if taken and label == killed_in and len(given) <= 2:
                raise KeyboardInterrupt
            taken.append(item.id)
            take(item, made)

        run_items(executor, items, folder, take_one, label, unit)

    workers_here()
    monkeypatch.setattr(parts, "run_items", stopping)
    with pytest.raises(KeyboardInterrupt):
        collect_by_workers(checkpoint, tokens, by_workers, 1, True, TWO)
    before = len(given)
    given += [("", 0), ("", 0)]  # so that nothing stops any more
    collect_by_workers(checkpoint, tokens, by_workers, 1, True, TWO)
    again = dict(given[before + 2 :])
    first_time = killed_in == "calibrating"
    assert again == {"calibrating": 2 if first_time else 0, "merging": 2 if first_time else 1}
    assert statistics(by_workers) == statistics(alone)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_that_is_killed_between_two_renames_goes_on(
    checkpoint, folders, workers_here, monkeypatch, number
):
    tokens = tokens_of(checkpoint, 4, 20)
    alone, by_workers = folders
    collect_statistics(checkpoint, tokens, alone, 1, True)
    workers_here()
    rename = os.rename

    def killed(source, target):
        rename(source, target)
        if Path(target).name == ("inputs-000", "weighted-000", "outputs-001")[number] + SUFFIX:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        collect_by_workers(checkpoint, tokens, by_workers, 1, True, TWO)
    collect_by_workers(checkpoint, tokens, by_workers, 1, True, TWO)
    assert statistics(by_workers) == statistics(alone)
    assert not (by_workers / "items").exists()


def test_merging_has_the_same_bits_with_more_threads(tmp_path):
    """Products of this width are summed otherwise by several threads."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for threads in (1, 2):
        part, made = tmp_path / f"part{threads}", tmp_path / f"made{threads}"
        part.mkdir()
        made.mkdir()
        writer = BlockWriter(part, INPUTS)
        generator.manual_seed(0)
        for number in range(3):
            rows = torch.randn(64, 1536, generator=generator).double()
            peak = rows.abs().amax(0).float()
            sample = rows[:2].float()
            kept = InputSums(rows.T @ rows, peak, [sample], 64)
            writer.add(f"layer{number}", None, **kept.tensors())
        writer.close(0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            parts.merge_block([str(part)], [INPUTS], 0, made)
        finally:
            torch.set_num_threads(before)
        found.append((made / f"inputs-000{SUFFIX}").read_bytes())
    assert found[0] == found[1]


def test_a_run_that_is_killed_while_it_drops_another_kind_s_files_goes_on(
    runs, tmp_path, workers_here, monkeypatch
):
    workers_here()
    folder = tmp_path / "folder"
    for name in ("folder", "alone"):
        (tmp_path / name).mkdir()
    runs.collect(tmp_path / "alone")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(calibrate, "effective_tokens", stop)
        runs.collect(folder, TWO)
    unlinked = []
    unlink = Path.unlink

    def killed(path, **options):
        unlink(path, **options)
        unlinked.append(path.name)
        if len(unlinked) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        runs.collect(folder)
    runs.collect(folder)
    assert statistics(folder) == statistics(tmp_path / "alone")


def test_a_worker_that_sees_another_model_stops(checkpoint, tmp_path, workers_here, monkeypatch):
    calls = []
    inputs = parts._inputs

    def other_on_the_worker(*arguments):
        calls.append(arguments)
        return inputs(*arguments) | ({"model": "another"} if len(calls) > 1 else {})

    monkeypatch.setattr(parts, "_inputs", other_on_the_worker)
    workers_here()
    with pytest.raises(StageError, match=r"expected on \S+ the model of the stage") as caught:
        collect_by_workers(checkpoint, tokens_of(checkpoint, 4, 20), tmp_path, None, False, TWO)
    assert caught.value.failure is Failure.ARTIFACT_CHANGED


def test_parts_have_all_batches_in_order():
    for batches in (1, 2, 7, 8, 9, 30, 64):
        found = sums.parts_of(batches)
        assert [number for part in found for number in part] == list(range(batches))
        assert len(found) == min(batches, sums.PARTS)
        sizes = [len(part) for part in found]
        assert max(sizes) - min(sizes) <= 1
        assert sums.last_batches(batches) == {part[-1] for part in found}


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_upper_triangles_come_back(width):
    import torch

    generator = torch.Generator().manual_seed(width)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    sums.narrow(matrix)
    packed = sums.pack_upper(matrix)
    assert packed.dtype == np.float32
    assert torch.equal(sums.unpack_upper(packed, width).triu(), matrix.triu())


@pytest.fixture
def runs(tmp_path, tiny_model) -> CalibrationRun:
    """A calibration of a text in a file."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"ada met hugo {number} times" for number in range(400)))
    options = Calibration(
        source="file", path=str(text), sequences=6, length=20, curvature=True, watch=str(text)
    )
    return CalibrationRun(Checkpoint(tiny_model), options, seed=0)


@pytest.mark.parametrize("first, second", [(None, TWO), (TWO, None)])
def test_what_a_run_of_the_other_kind_left_is_of_no_use(
    runs, tmp_path, workers_here, monkeypatch, first, second
):
    workers_here()
    (tmp_path / "alone").mkdir()
    (tmp_path / "folder").mkdir()
    runs.collect(tmp_path / "alone")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(calibrate, "effective_tokens", stop)
        runs.collect(tmp_path / "folder", first)
    runs.collect(tmp_path / "folder", second)
    left = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    assert left == {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}


def test_a_model_with_experts_is_calibrated_in_one_process(
    runs, make_model, tmp_path, monkeypatch, capsys
):
    sizes = {"num_local_experts": 3, "num_hidden_layers": 1}
    runs.checkpoint = Checkpoint(make_model(tmp_path / "experts", "mixtral", **sizes))
    monkeypatch.setattr(parts, "run_items", lambda *arguments: pytest.fail("divided"))
    (tmp_path / "folder").mkdir()
    info = runs.collect(tmp_path / "folder", TWO)
    assert info["experts"]
    assert "one process does all of it" in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_processes_make_the_same_bytes(checkpoint, folders, monkeypatch, workers):
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 4096)  # as it is in a process
    tokens = tokens_of(checkpoint, 50, 300)
    alone, by_workers = folders
    collect_statistics(checkpoint, tokens, alone, 0, True)
    executor = Executor(workers=workers)
    collect_by_workers(checkpoint, tokens, by_workers, 0, True, executor)
    assert statistics(by_workers) == statistics(alone)
