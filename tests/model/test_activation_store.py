"""States in memory and in a file are the same, and none of them leaves anything behind."""

import numpy as np
import pytest
import torch

from quantline.model import activation_store
from quantline.model.activation_store import ActivationBatches, ActivationStore

SHAPES = [(2, 3, 4), (2, 3, 4), (1, 3, 4)]


def filled(folder, seed: int) -> tuple[ActivationBatches, list[torch.Tensor]]:
    """Return batches of random states, and the same states as a list."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    batches = ActivationBatches(SHAPES, folder)
    batches.fill(tensors)
    return batches, tensors


def assert_equal(states, expected) -> None:
    for state, tensor in zip(states, expected, strict=True):
        assert torch.equal(state, tensor)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 20])
def test_activation_batches_are_read_as_they_were_put(tmp_path, monkeypatch, resident_bytes):
    monkeypatch.setattr(activation_store, "RESIDENT_BYTES", resident_bytes)
    batches, tensors = filled(tmp_path, 0)
    not_contiguous = tensors[1].transpose(1, 2).contiguous().transpose(1, 2) * 2
    assert not not_contiguous.is_contiguous()
    tensors[1] = not_contiguous
    batches[1] = not_contiguous
    assert len(batches) == 3
    assert batches.bytes == 4 * 60
    assert_equal(batches, tensors)
    assert not list(tmp_path.iterdir())
    copy = batches.like()
    copy.fill(batches)
    copy[0] = tensors[0] + 1
    assert torch.equal(batches[0], tensors[0])


def test_activation_store_shares_slots_and_outlives_its_writer(tmp_path):
    first, first_tensors = filled(tmp_path, 1)
    second, second_tensors = filled(tmp_path, 2)
    store = ActivationStore(tmp_path / "states", 2, first)
    store.put(0, first)
    store.put(3, second)
    reopened = ActivationStore(tmp_path / "states", 2, first)
    assert_equal(reopened.get(0), first_tensors)
    assert_equal(reopened.get(1), second_tensors)
    assert_equal(reopened.get(2), first_tensors)


def test_activation_store_notices_a_file_that_is_cut_short(tmp_path):
    batches, _ = filled(tmp_path, 3)
    store = ActivationStore(tmp_path / "states", 1, batches)
    store.put(0, batches)
    with (tmp_path / "states").open("r+b") as file:
        file.truncate(batches.bytes - 4)
    with pytest.raises(EOFError, match="found fewer"):
        list(store.get(0))


def test_activation_batches_go_to_a_file_when_they_outgrow_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "RESIDENT_BYTES", 4 * int(np.prod(SHAPES[0])))
    assert ActivationBatches(SHAPES[:1], tmp_path)._file is None
    assert ActivationBatches(SHAPES, tmp_path)._file is not None


def test_batch_is_one_of_a_set(tmp_path):
    sets = [filled(tmp_path, seed) for seed in range(2)]
    store = ActivationStore(tmp_path / "states", 2, sets[0][0])
    for number, (batches, _) in enumerate(sets):
        store.put(number, batches)
    for number, (_, tensors) in enumerate(sets):
        for index, tensor in enumerate(tensors):
            assert torch.equal(store.batch(number, index), tensor)
