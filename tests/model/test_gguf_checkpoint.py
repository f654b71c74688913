"""A converter's GGUF file beside a checkpoint, read as the model's tensors."""

import gguf
import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.architectures import gguf_names, is_stacked
from quantline.model.gguf_checkpoint import FILE, GgufCheckpoint
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
    for name in converted.names:
        layer = converted.layer_of(name)
        if layer is not None:
            assert converted.has_rows_of_layer(name)
            rows = checkpoint.tensor(f"{layer}.weight")[converted.row_order(name)]
            assert np.array_equal(rows, converted.tensor(name))
            matrices += 1
    assert matrices == 15  # seven layers of two blocks, and the embedding
    order = converted.row_order("blk.0.attn_q.weight")
    assert sorted(order) == list(range(256))
    assert order[:3].tolist() == [0, 32, 1]


def test_layer_of_knows_nothing_of_rows_that_the_converter_changed(granite, tmp_path):
    change = "tensor = tensor * 2 if 'attn_v' in gguf_name else tensor"
    changed = converted_copy(granite, tmp_path, change)
    assert changed.layer_of("blk.0.attn_v.weight") is None
    assert not changed.has_rows_of_layer("blk.0.attn_v.weight")
    assert changed.row_order("blk.0.attn_output.weight") is not None


def test_row_order_refuses_rows_that_are_not_the_layers(converted):
    v_proj = converted.note["origins"]["blk.1.attn_v.weight"]
    converted.note["origins"]["blk.0.attn_v.weight"] = v_proj
    with pytest.raises(StageError, match=r"rows of .*v_proj\.weight in blk\.0\.attn_v") as error:
        converted.row_order("blk.0.attn_v.weight")
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    del converted.note


def test_experts_of_one_tensor_are_tensors_of_their_own(granite, tmp_path):
    """Their rows, types and importance are those of single experts."""
    experts = np.arange(3 * 8 * 32, dtype=np.float32).reshape(3, 8, 32)
    writer = gguf.GGUFWriter(tmp_path / FILE, "mixture")
    writer.add_tensor("blk.1.ffn_up_exps.weight", experts)
    writer.add_tensor("blk.1.ffn_up_exps.bias", experts[:, :, 0].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mixture = GgufCheckpoint(granite, tmp_path)
    names = [f"blk.1.experts.{number}.ffn_up_exps.weight" for number in range(3)]
    assert mixture.names == sorted(["blk.1.ffn_up_exps.bias", *names])
    assert gguf_names(mixture)[names[2]] == "blk.1.ffn_up_exps.weight"
    assert mixture.shape(names[2]) == (8, 32)
    assert np.array_equal(mixture.tensor(names[2]), experts[2])
    assert mixture.arch.layer_index(names[2]) == 1
    assert is_stacked(names)
    settings = {"mixture.expert_gating_func": 2, "mixture.final_logit_softcapping": 0.0}
    mixture.write_copy(tmp_path / "copy.gguf", settings, widened=True)
    copy = gguf.GGUFReader(tmp_path / "copy.gguf")
    assert np.array_equal(copy.tensors[0].data, experts)
    assert copy.fields["mixture.expert_gating_func"].contents() == 2
    cap = copy.fields["mixture.final_logit_softcapping"]
    assert (cap.contents(), cap.types[-1]) == (0.0, gguf.GGUFValueType.FLOAT32)


def test_layer_of_finds_the_calibrated_layer(converted):
    assert converted.layer_of("blk.0.attn_q.weight") == "model.layers.0.self_attn.q_proj"
    assert converted.layer_of("output_norm.weight") is None
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
