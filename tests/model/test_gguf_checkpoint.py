"""A converter's GGUF file beside a checkpoint, read as the model's tensors."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import GgufCheckpoint, source_for_gguf
from tests.helpers.granite import MULTIPLIERS, converted_copy


@pytest.fixture(scope="module")
def granite(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("granite") / "model", "granite", **MULTIPLIERS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, granite) -> GgufCheckpoint:
    """The model with the converter's file beside it."""
    return converted_copy(granite, tmp_path_factory.mktemp("converted"))


def test_row_order_is_found_by_the_rows_themselves(converted):
    checkpoint = converted.checkpoint
    matrices = 0
    for name, source in converted.checkpoint_names.items():
        if len(converted.shape(name)) > 1:
            rows = checkpoint.tensor(source)[converted.row_order(name)]
            assert np.array_equal(rows, converted.tensor(name))
            matrices += 1
    assert matrices == 15  # seven layers of two blocks, and the embedding
    order = converted.row_order("blk.0.attn_q.weight")
    assert sorted(order) == list(range(256))
    assert order[:3].tolist() == [0, 32, 1]


def test_row_order_refuses_rows_that_the_converter_changed(granite, tmp_path):
    change = "tensor = tensor * 2 if 'attn_v' in gguf_name else tensor"
    changed = converted_copy(granite, tmp_path, change)
    with pytest.raises(StageError, match=r"rows of .*v_proj\.weight in blk\.0\.attn_v") as error:
        changed.row_order("blk.0.attn_v.weight")
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert "take the method kquant" in str(error.value)
    assert changed.row_order("blk.0.attn_output.weight") is not None


def test_layer_of_finds_the_calibrated_layer(converted):
    assert converted.layer_of("blk.0.attn_q.weight") == "model.layers.0.self_attn.q_proj"
    assert converted.layer_of("output_norm.weight") == "model.norm"
    assert converted.layer_of("rope_freqs.weight") is None


def test_gguf_checkpoint_has_the_names_of_the_file_and_the_sizes_of_the_checkpoint(converted):
    arch = converted.arch
    assert converted.converted
    assert arch.layer_index("blk.1.attn_q.weight") == 1
    assert arch.family.gguf.name == arch.model_type == "granite"
    assert arch.tied
    assert arch.hidden_size == converted.checkpoint.arch.hidden_size
    assert converted.config == converted.checkpoint.config
    assert set(converted.stamp()) == {"model.safetensors", "converted.gguf"}


def test_keeps_float32_is_true_where_the_converter_widened_a_tensor(converted):
    assert converted.stored_dtype("blk.0.attn_norm.weight") == "BF16"
    assert converted.keeps_float32("blk.0.attn_norm.weight")
    assert not converted.keeps_float32("blk.0.attn_q.weight")
    assert converted.raw("blk.0.attn_q.weight").dtype.itemsize == 2
    assert converted.optional("output.weight") is None


def test_source_for_gguf_takes_the_converters_file_where_there_is_one(
    converted, granite, tiny_model
):
    assert isinstance(source_for_gguf(converted.folder), GgufCheckpoint)
    assert isinstance(source_for_gguf(granite), Checkpoint)
    assert source_for_gguf(tiny_model).arch.model_type == "llama"
