"""A source's own codes, where a recipe wants the form that they have."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from quantline.ingest.dequantize import dequantize
from quantline.ingest.dequantize.gguf import write_folder
from quantline.quantized.source_codes import SourceCodes
from tests.helpers.bundles import settled
from tests.helpers.ggml_recipes import CalibratedModel, calibrated_model, kquant, quantize_by
from tests.helpers.gguf import file_of, write_unquantized
from tests.helpers.llama_quantize import quantize
from tests.helpers.models import write_model
from tests.helpers.quantized_sources import is_linear, plain_tensors, write_source
from tests.helpers.variants import write_variant

MIXTURE = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def source(request, tmp_path_factory) -> tuple[Path, CalibratedModel]:
    """A file in Q4_K_M, and the calibrated model that was read from it."""
    root = tmp_path_factory.mktemp(request.param)
    sizes = MIXTURE if request.param == "qwen3_moe" else {"intermediate_size": 256}
    plain = write_model(root / "plain", request.param, num_hidden_layers=1, **sizes)
    floats = file_of(write_unquantized(root, settled(plain), "float32").bundle)
    file = root / "source.gguf"
    status, log = quantize(floats, file, "Q4_K_M")
    assert status == 0, log
    write_folder(file, root / "model")
    return file, calibrated_model(root, settled(root / "model"), 2, 16)


def tensors_of(path: Path) -> dict[str, gguf.gguf_reader.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_a_recipe_of_the_same_types_gives_the_source_bit_by_bit(source, tmp_path):
    file, model = source
    quantized = quantize_by(kquant("Q4_K_M", importance=False), model, tmp_path / "quantized")
    write_variant("gguf", tmp_path / "bundle", model.source, quantized)
    wanted = tensors_of(file)
    found = tensors_of(file_of(tmp_path / "bundle"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(found[name].data, tensor.data), name
    reports = quantized.report["tensors"]
    passed_on = {name for name, report in reports.items() if "codes" in report}
    assert passed_on == {name.partition("/")[2] for name in SourceCodes(model.source.folder).keys}


def test_a_recipe_of_other_types_takes_the_blocks_of_its_own_type_alone(source, tmp_path):
    _, model = source
    codes = SourceCodes(model.source.folder)
    quantized = quantize_by(kquant("Q6_K", importance=False), model, tmp_path / "quantized")
    reports = quantized.report["tensors"]
    for name, report in reports.items():
        own = codes.blocks(name, "Q6_K")
        assert ("codes" in report) == (own is not None), name
        if own is not None:
            assert np.array_equal(quantized.ggml_blocks(name).data, own)
    assert any("codes" in report for report in reports.values())
    assert not all("codes" in report for report in reports.values())


def test_blocks_whose_rows_are_not_the_models_are_not_kept(make_model, tmp_path):
    """Those of GPT-2 are turned, so that a row of the file is none of the checkpoint."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    plain = settled(make_model(tmp_path / "plain", "gpt2", **sizes))
    floats = file_of(write_unquantized(tmp_path, plain, "float32").bundle)
    assert quantize(floats, tmp_path / "q8.gguf", "Q8_0")[0] == 0
    write_folder(tmp_path / "q8.gguf", tmp_path / "model")
    assert SourceCodes(tmp_path / "model").keys == {"Q8_0/transformer.wte.weight"}


def test_a_model_without_codes_has_none(tmp_path):
    assert SourceCodes(tmp_path).blocks("model.norm.weight", "Q4_K") is None


GROUPED = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}


def packed_by_the_library(name, weight):
    """Return a layer as llm-compressor stores it: 4 bits, symmetric, groups of 32."""
    if not is_linear(name):
        return None
    groups = weight.float().reshape(len(weight), -1, 32)
    scale = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": INT4})
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return {name.replace("weight", part): tensor for part, tensor in stored.items()}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
SETTINGS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
}


@pytest.fixture(scope="module")
def integers(tiny_model, tmp_path_factory) -> tuple[Path, CalibratedModel]:
    """A source in packed integers, and the calibrated model that was read from it."""
    root = tmp_path_factory.mktemp("integers")
    source = write_source(tiny_model, root / "source", SETTINGS, packed_by_the_library)
    dequantize(source, root / "model")
    return source, calibrated_model(root, settled(root / "model"), 2, 16)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_integers_in_the_form_of_the_recipe_pass_through_bit_by_bit(method, integers, tmp_path):
    source, model = integers
    quantized = quantize_by(GROUPED | {"method": method}, model, tmp_path / "quantized")
    assert all("codes" in report for report in quantized.report["layers"].values())
    write_variant("safetensors", tmp_path / "bundle", model.source, quantized)
    wanted = plain_tensors(source)
    found = plain_tensors(tmp_path / "bundle")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(found[name], tensor), name


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"symmetric": False}])
def test_integers_in_another_form_are_rounded(change, integers, tmp_path):
    quantized = quantize_by(GROUPED | change, integers[1], tmp_path / "quantized")
    assert not any("codes" in report for report in quantized.report["layers"].values())
