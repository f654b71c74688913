"""Quantized layers that transformers does not load are refused; tests/families tries the rest."""

import pytest

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.loadable import check_grids
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import Scheme

FOUR = Scheme("int4", True, 32, per_row=False)
THREE = Scheme("int3", True, 32, per_row=False)


def test_check_grids_refuses_several_in_a_model_with_experts(tmp_path, make_model):
    folder = make_model(tmp_path / "m", "mixtral", num_local_experts=4, hidden_size=64)
    arch = Checkpoint(folder).arch
    check_grids(arch, {FOUR: ["a", "b"]})
    with pytest.raises(StageError, match=r"expected one grid .* of mixtral .*, found 2") as caught:
        check_grids(arch, {FOUR: ["a"], THREE: ["b"]})
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_check_grids_takes_several_in_a_model_without(tiny_model):
    check_grids(Checkpoint(tiny_model).arch, {FOUR: ["a"], THREE: ["b"]})
