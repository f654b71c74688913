"""Tensors of safetensors files: what they are, and that files are closed in between."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from quantline.model import stored_tensors
from quantline.model.stored_tensors import StoredTensors
from quantline.model.torch_numbers import computed_with


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "matrix": draw.standard_normal((6, 4)).astype(ml_dtypes.bfloat16),
        "fused": draw.standard_normal((3, 4, 2)).astype(np.float16),
        "single": np.array(3.0, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "whole": np.arange(5),
    }


def write(folder: Path, arrays: dict[str, np.ndarray]) -> StoredTensors:
    path = folder / "model.safetensors"
    save_file(arrays, path)
    return StoredTensors(dict.fromkeys(arrays, path))


def test_stored_tensors_are_as_they_were_written(tmp_path, arrays):
    stored = write(tmp_path, arrays)
    for key, array in arrays.items():
        assert stored.shape(key) == array.shape
        read = stored.read(key)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
    assert stored.dtype("matrix") == "BF16"
    np.testing.assert_array_equal(stored.read_rows("fused", 1, 3), arrays["fused"][1:3])
    np.testing.assert_array_equal(stored.read_rows("single", 0, 1), arrays["single"])


def test_stored_tensors_of_float8_are_read_too(tmp_path):
    values = torch.tensor([[1.0, -2.0]]).to(torch.float8_e4m3fn)
    save_torch_file({"weight": values}, tmp_path / "a.safetensors")
    stored = StoredTensors({"weight": tmp_path / "a.safetensors"})
    assert stored.read("weight").astype(np.float32).tolist() == [[1.0, -2.0]]


def test_stored_tensors_leave_files_open_for_so_many_bytes_alone(tmp_path, arrays, monkeypatch):
    opened = []
    opens = stored_tensors.safe_open
    monkeypatch.setattr(
        stored_tensors, "safe_open", lambda *args: opened.append(args) or opens(*args)
    )
    monkeypatch.setattr(stored_tensors, "BYTES_BEFORE_CLOSING", 100)
    stored = write(tmp_path, arrays)
    for _ in range(3):
        stored.read("matrix")  # of 48 bytes
    assert len(opened) == 2  # for the header, and for three tensors
    stored.read("matrix")
    assert len(opened) == 3


def test_stored_tensors_of_a_name_that_two_files_hold_are_those_of_the_named_one(tmp_path):
    for number in (0, 1):
        save_file({"a": np.zeros(2 + number), f"b{number}": np.zeros(1)}, tmp_path / f"{number}")
    stored = StoredTensors({"a": tmp_path / "1", "b0": tmp_path / "0", "b1": tmp_path / "1"})
    assert stored.shape("b0") == (1,)
    assert stored.shape("a") == (3,)


def test_computed_with_changes_no_value(arrays):
    for array in arrays.values():
        made = computed_with(array).numpy()
        expected = array if array.dtype.kind == "i" else array.astype(np.float32)
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made, expected)
