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
    first, second, *_ = arch.expert_linears()
    others = [name for name in arch.linears() if ".experts." not in name]
    check_grids(arch, {FOUR: [first, second], THREE: others})
    words = r"expected one grid for all experts of mixtral .*, found int3 .*, int4 "
    with pytest.raises(StageError, match=words) as caught:
        check_grids(arch, {FOUR: [first], THREE: [second]})
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_check_grids_refuses_several_for_layers_that_servers_fuse(tiny_model):
    arch = Checkpoint(tiny_model).arch
    queries, keys = (f"model.layers.1.self_attn.{part}_proj" for part in "qk")
    check_grids(arch, {FOUR: [queries, keys], THREE: ["model.layers.1.mlp.down_proj"]})
    with pytest.raises(StageError, match=f"found several for {queries}, {keys}") as caught:
        check_grids(arch, {FOUR: [queries], THREE: [keys]})
    assert caught.value.failure == Failure.UNSUPPORTED_WIDTH


def test_check_grids_takes_several_in_a_model_without(tiny_model):
    check_grids(Checkpoint(tiny_model).arch, {FOUR: ["a"], THREE: ["b"]})
