"""Files written tensor by tensor are ordinary safetensors."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.model.safetensors_writer import SafetensorsWriter

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.zeros((0, 4), np.float16),
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "scalar": np.float32(7).reshape(()),
    "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
}


def test_safetensors_writer_writes_what_safetensors_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [*TENSORS, "never"]) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    stored = load_file(path)
    assert set(stored) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype, name
        assert np.array_equal(stored[name], tensor), name


def test_safetensors_writer_refuses_a_name_twice(tmp_path):
    with (
        pytest.raises(ValueError, match="twice"),
        SafetensorsWriter(tmp_path / "y", ["a"]) as writer,
    ):
        writer.add("a", TENSORS["a"])
        writer.add("a", TENSORS["a"])


def test_safetensors_writer_refuses_more_names_than_it_kept_room_for(tmp_path):
    with (
        pytest.raises(ValueError, match="expected a header of at most"),
        SafetensorsWriter(tmp_path / "y", ["a"]) as writer,
    ):
        for number in range(9):
            writer.add(f"unannounced-{number}" * 9, TENSORS["a"])
