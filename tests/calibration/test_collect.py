"""Collecting statistics: the same from memory and from files, complete or refused."""

import pytest

from quantline.calibration.block_files import BlockWriter
from quantline.calibration.collect import check_coverage, collect_statistics, remove_progress
from quantline.errors import Failure, StageError
from quantline.model import activation_store
from quantline.model.checkpoint import Checkpoint
from tests.helpers.quantized import tokens_of


def test_collect_statistics_is_the_same_from_memory_and_from_a_file(
    tiny_narrow, tmp_path, monkeypatch
):
    checkpoint = Checkpoint(tiny_narrow)
    tokens = tokens_of(checkpoint, 6, 32)
    files = []
    for resident_bytes in (0, 1 << 30):
        monkeypatch.setattr(activation_store, "RESIDENT_BYTES", resident_bytes)
        folder = tmp_path / str(resident_bytes)
        folder.mkdir()
        collect_statistics(checkpoint, tokens, folder, seed=0, weighted=True)
        remove_progress(folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    assert sorted(files[0]) == [
        "embedding.safetensors",
        "final.safetensors",
        "inputs-000.safetensors",
        "inputs-001.safetensors",
        "outputs-000.safetensors",
        "outputs-001.safetensors",
        "weighted-000.safetensors",
        "weighted-001.safetensors",
    ]


def test_collect_statistics_does_not_run_blocks_again_whose_files_are_there(
    tiny_narrow, tmp_path, monkeypatch
):
    """Killed after the forward pass: the states and the experts' tokens are there still."""
    checkpoint = Checkpoint(tiny_narrow)
    tokens = tokens_of(checkpoint, 6, 32)
    complete = tmp_path / "complete"
    complete.mkdir()
    layers = collect_statistics(checkpoint, tokens, complete, seed=0, weighted=True)

    class Killed(BaseException):
        """Ends the run without tidying up."""

    def kill(*_):
        raise Killed

    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantline.calibration.collect.last_block_gradients", kill)
        with pytest.raises(Killed):
            collect_statistics(checkpoint, tokens, folder, seed=0, weighted=True)
    written = []
    close = BlockWriter.close

    def close_and_note(self, block):
        written.append((self.kind, block))
        close(self, block)

    monkeypatch.setattr(BlockWriter, "close", close_and_note)
    assert collect_statistics(checkpoint, tokens, folder, seed=0, weighted=True) == layers
    assert written == [("weighted", 1), ("outputs", 1), ("weighted", 0), ("outputs", 0)]
    remove_progress(complete)
    for path in complete.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_check_coverage_refuses_a_layer_that_missed_tokens(tiny_narrow):
    arch = Checkpoint(tiny_narrow).arch
    layers = {name: {"tokens": 10} for name in arch.linears()}
    check_coverage(arch, layers, 10)
    for wrong in ({"tokens": 9}, {"tokens": 11}, None):
        name = "model.layers.1.mlp.up_proj"
        changed = {key: entry for key, entry in layers.items() if key != name}
        if wrong:
            changed[name] = wrong
        tokens = wrong["tokens"] if wrong else 0
        expected = rf"layers\.1\.mlp\.up_proj to see 10 tokens, found {tokens}"
        with pytest.raises(StageError, match=expected) as error:
            check_coverage(arch, changed, 10)
        assert error.value.failure == Failure.CALIBRATION_EMPTY


def test_collect_statistics_has_no_outputs_without_a_seed(tiny_narrow, tmp_path):
    checkpoint = Checkpoint(tiny_narrow)
    tokens = tokens_of(checkpoint, 6, 32)
    layers = collect_statistics(checkpoint, tokens, tmp_path)
    remove_progress(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "final.safetensors",
        "inputs-000.safetensors",
        "inputs-001.safetensors",
    ]
    assert sorted({entry["block"] for entry in layers.values()}) == [0, 1]
    assert {entry["tokens"] for entry in layers.values()} == {tokens.size}
