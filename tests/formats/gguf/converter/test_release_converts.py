"""The converter of the release that is installed, on models without a table."""

import numpy as np
import pytest

from quantline.api import calibrate, load_checkpoint, quantize, text_file
from quantline.files import versions
from quantline.formats.gguf.converter import release
from quantline.formats.gguf.converter.conversion import conversion_of
from quantline.formats.gguf.source import source_for_gguf
from quantline.runtimes import converted_logits
from tests.helpers.models import place_model

VERSION = versions(release.PACKAGE)[release.PACKAGE]
kept = any(release.is_kept(folder, VERSION) for folder in release.places(VERSION))
pytestmark = pytest.mark.skipif(not kept, reason="`make` keeps the converter, and none is here")


def test_the_release_converts_a_model_without_a_table(make_model, tmp_path):
    folder = tmp_path / "model"
    made = make_model(tmp_path / "made", "olmo2", tie_word_embeddings=False, num_hidden_layers=1)
    place_model(made, folder)
    converted = conversion_of(folder, "auto")
    assert converted.architecture_name == "olmo2"
    step = converted.note["step"]
    assert (step["package"], step["version"]) == ("llama-cpp-python", VERSION)
    assert step["vocabulary"] == "quantline"
    figures = converted_logits.compare(str(folder), 1)
    assert converted_logits.agree(figures)
    assert figures["relative_error"] < 1e-4
    matrices = [name for name in converted.names if name.startswith("blk.0") and "norm" not in name]
    assert all(converted.has_rows_of_layer(name) for name in matrices)
    assert len(matrices) == 7


@pytest.mark.slow
def test_a_cap_that_llama_cpp_takes_for_granted_is_taken_back(make_model, tmp_path):
    """Gemma 4 is published with a cap of 30; a model without one says so in its GGUF file."""
    sizes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    sizes |= {"final_logit_softcapping": None, "head_dim": 64, "global_head_dim": 64}
    sizes |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    made = make_model(tmp_path / "made", "gemma4_text", **sizes)
    model = load_checkpoint(made, tmp_path / "model")
    conversion_of(model.folder, "auto")
    figures = converted_logits.compare(str(model.folder), 1)
    assert converted_logits.agree(figures)
    assert figures["settings"] == {"gemma4.final_logit_softcapping": 0.0}


SIZES = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 256,
    "tie_word_embeddings": False,
}
# A mixture → its sizes, and the setting of llama.cpp's file that only its logits tell.
MIXTURES = {
    "olmoe": (SIZES | {"num_key_value_heads": 4}, {}),
    "exaone_moe": (
        SIZES | {"moe_intermediate_size": 256, "first_k_dense_replace": 1},
        {"exaone-moe.expert_gating_func": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_rounded_by_their_own_importance(family, make_model, texts, tmp_path):
    sizes, settings = MIXTURES[family]
    made = make_model(tmp_path / "made", family, **sizes)
    model = load_checkpoint(made, tmp_path / "model")
    text = text_file(texts / "calibration.txt", sequences=4, length=64)
    calibration = calibrate(model, text, tmp_path / "calibration", gradients=True)
    recipe = {"method": "kquant-curvature", "mix": "Q4_K_M"}
    report = quantize(model, calibration, recipe, tmp_path / "rounded").report
    source = source_for_gguf(model.folder)
    experts = [name for name in source.names if ".experts." in name]
    assert experts
    for name in experts:
        layer = source.layer_of(name)
        assert f".experts.{name.split('.experts.')[1].split('.')[0]}." in layer
        order = source.row_order(name)
        assert np.array_equal(source.tensor(name), model.tensor(f"{layer}.weight")[order])
        assert report["tensors"][name]["importance"]
        assert "divergence" in report["tensors"][name]
    figures = converted_logits.compare(str(model.folder), 1)
    assert converted_logits.agree(figures)
    assert figures["settings"] == settings
