"""States in memory and in a file are the same, and none of them leaves anything behind."""

import numpy as np
import pytest
import torch
from rounded import tokens_of

from quantline.model import activation_store as states
from quantline.calibration.collect import collect
from quantline.model.checkpoint import Checkpoint
from quantline.model.activation_store import Batches, StoredStates

SHAPES = [(2, 3, 4), (2, 3, 4), (1, 3, 4)]


def filled(folder, seed: int) -> tuple[Batches, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    made, batches = [torch.randn(shape, generator=draw) for shape in SHAPES], Batches(SHAPES, folder)
    batches.fill(made)
    return batches, made


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_batches_are_read_as_they_were_put(tmp_path, monkeypatch, held):
    monkeypatch.setattr(states, "HELD", held)
    batches, made = filled(tmp_path, 0)
    made[1] = made[1].transpose(1, 2).contiguous().transpose(1, 2) * 2  # not contiguous
    batches[1] = made[1]
    assert len(batches) == 3 and batches.bytes == 4 * 60
    assert all(torch.equal(one, other) for one, other in zip(batches, made, strict=True))
    assert not list(tmp_path.iterdir())
    other = batches.like()
    other.fill(batches)
    other[0] = made[0] + 1
    assert torch.equal(batches[0], made[0])


def test_sets_share_slots_and_outlive_their_writer(tmp_path):
    (first, made), (second, others) = filled(tmp_path, 1), filled(tmp_path, 2)
    stored = StoredStates(tmp_path / "states", 2, first)
    stored.put(0, first)
    stored.put(3, second)
    again = StoredStates(tmp_path / "states", 2, first)
    for number, wanted in ((0, made), (1, others), (2, made)):
        assert all(torch.equal(one, other) for one, other in zip(again.get(number), wanted, strict=True))


def test_a_file_that_is_cut_short_is_noticed(tmp_path):
    batches, _ = filled(tmp_path, 3)
    stored = StoredStates(tmp_path / "states", 1, batches)
    stored.put(0, batches)
    with (tmp_path / "states").open("r+b") as file:
        file.truncate(batches.bytes - 4)
    with pytest.raises(EOFError, match="found fewer"):
        list(stored.get(0))


def test_calibration_is_the_same_from_memory_and_from_a_file(tiny_narrow, tmp_path, monkeypatch):
    checkpoint, found = Checkpoint(tiny_narrow), []
    for held in (0, 1 << 30):
        monkeypatch.setattr(states, "HELD", held)
        folder = tmp_path / str(held)
        folder.mkdir()
        collect(checkpoint, tokens_of(checkpoint, 6, 32), folder, seed=0)
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1] and len(found[0]) == 6


def test_states_outgrow_memory_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "HELD", 4 * int(np.prod(SHAPES[0])))
    assert Batches(SHAPES[:1], tmp_path)._file is None and Batches(SHAPES, tmp_path)._file is not None
