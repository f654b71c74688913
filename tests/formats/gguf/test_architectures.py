"""Names, orders of rows and norms in a GGUF file."""

from dataclasses import replace

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.architectures import (
    dimensions,
    gguf_family,
    gguf_names,
    group_by_gguf_name,
    norm_offset,
    row_order,
)
from quantline.model.checkpoint import Checkpoint
from quantline.model.family import interleave_halves, split_heads


def test_gguf_family_is_refused_where_the_family_has_none(tiny_model):
    arch = Checkpoint(tiny_model).arch
    assert gguf_family(arch).name == "llama"
    unknown = replace(arch, model_type="olmo2", family=replace(arch.family, gguf=None))
    words = "expected a model among gemma2, .*starcoder2 for GGUF, found olmo2.*model.converter"
    with pytest.raises(StageError, match=words) as caught:
        gguf_family(unknown)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_gguf_names_has_every_tensor_and_experts_share_one(tmp_path, make_model):
    folder = make_model(
        tmp_path / "m", "mixtral", num_local_experts=12, num_hidden_layers=1, hidden_size=64
    )
    source = Checkpoint(folder)
    names = gguf_names(source)
    assert sorted(names) == source.names
    assert names["model.layers.0.self_attn.q_proj.weight"] == "blk.0.attn_q.weight"
    groups = group_by_gguf_name(names)
    experts = groups["blk.0.ffn_gate_exps.weight"]
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert experts == [f"{prefix}.{number}.w1.weight" for number in range(12)]
    assert dimensions(source, experts) == 3
    assert dimensions(source, groups["blk.0.attn_q.weight"]) == 2
    assert dimensions(source, groups["output_norm.weight"]) == 1


def test_interleave_halves_puts_rotary_pairs_side_by_side_within_each_head():
    assert interleave_halves(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_split_heads_puts_queries_before_keys_before_values():
    assert split_heads(12, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_row_order_is_none_where_the_order_is_the_same(tiny_model):
    arch = Checkpoint(tiny_model).arch
    order = row_order(arch, "model.layers.0.self_attn.k_proj.weight", 128)
    assert np.array_equal(order, interleave_halves(128, arch.kv_heads))
    assert row_order(arch, "model.layers.0.self_attn.v_proj.weight", 128) is None


def test_norm_offset_is_what_gemma_leaves_out(tmp_path, make_model):
    arch = Checkpoint(make_model(tmp_path / "m", "gemma2", hidden_size=64)).arch
    assert norm_offset(arch, "model.norm.weight") == 1
    assert norm_offset(arch, "model.embed_tokens.weight") == 0
