"""`auto`, from the rounded layers to what transformers and onnxruntime compute from a bundle."""

import json

import numpy as np
import pytest

from quantline.config.recipes import parse_recipe
from quantline.errors import Failure, StageError
from quantline.formats.container import load_container
from quantline.recipes.grid_counts import describe_grids, grid_counts
from quantline.recipes.quantize import summarize
from quantline.runtimes.runtime import open_runtime
from tests.helpers.families import FamilyModel
from tests.helpers.quantized import differing, torch_logprobs, torch_model
from tests.helpers.variants import write_variant
from tests.helpers.vllm_rules import disagreements

CONTAINER = load_container("safetensors")
AUTO = {"bits": 4, "group_size": "auto", "symmetric": "auto"}
METHODS = ("rtn", "gptq", "awq")
MIXTURE = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "num_experts": 4,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> FamilyModel:
    """Rows of 192 and of 80 weights: groups of 64, and none that divides."""
    folder = tmp_path_factory.mktemp("dense")
    return FamilyModel(folder, "llama", hidden_size=192, intermediate_size=80)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> FamilyModel:
    """Experts with rows of 192 and 96 weights, beside a dense block."""
    return FamilyModel(tmp_path_factory.mktemp("mixture"), "qwen3_moe", **MIXTURE)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> FamilyModel:
    """A mixture without a table, with fused experts whose rows no group divides."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 80}
    folder = tmp_path_factory.mktemp("fused")
    return FamilyModel(folder, "gpt_oss", num_hidden_layers=1, **sizes)


def grids(quantized, part: str) -> set[tuple[int, bool]]:
    """Return group size and symmetry of the layers with `part` in their names."""
    found = set()
    for name in quantized.linears:
        if part in name:
            linear = quantized.linear(name)
            found.add((linear.group_size, linear.symmetric))
    return found


def config_groups(bundle) -> dict:
    config = json.loads((bundle / "config.json").read_text())
    return config["quantization_config"]["config_groups"]


def assert_computes(family: FamilyModel, quantized, format: str, runtime: str) -> None:
    """A bundle holds the integers exactly, and its runtime computes what torch does of them."""
    # In float32 norms that were scaled, and experts that transformers expands, stay as they are.
    options = {"dtype": "float32"} if format == "safetensors" else {}
    bundle = family.bundle(format, quantized, **options)
    assert differing(load_container(format), bundle, family.checkpoint, quantized) == []
    found = open_runtime(runtime, bundle, 1).logprobs(family.tokens)
    expected = torch_logprobs(torch_model(family.checkpoint, quantized), family.tokens)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_gets_the_largest_group_that_divides(dense, method):
    quantized = dense.quantized(AUTO | {"method": method})
    assert grids(quantized, "self_attn") == {(64, False)}
    assert grids(quantized, "gate_proj") | grids(quantized, "up_proj") == {(64, False)}
    assert grids(quantized, "down_proj") == {(80, False)}
    assert_computes(dense, quantized, "safetensors", "transformers")
    bundle = dense.bundle("safetensors", quantized, dtype="float32")
    weights = [group["weights"] for group in config_groups(bundle).values()]
    strategies = {(one["strategy"], one["group_size"]) for one in weights}
    assert strategies == {("group", 64), ("channel", None)}
    assert disagreements(bundle) == []


def test_onnx_takes_groups_and_whole_rows(dense):
    quantized = dense.quantized(AUTO | {"method": "gptq"})
    assert_computes(dense, quantized, "onnx", "onnxruntime")


@pytest.mark.parametrize("method", METHODS)
def test_experts_share_one_grid_without_zero_points(mixture, method):
    quantized = mixture.quantized(AUTO | {"method": method})
    assert grids(quantized, ".experts.") == {(32, True)}
    assert grids(quantized, "self_attn") == {(64, False)}
    assert grids(quantized, "layers.0.mlp.down_proj") == {(32, False)}
    assert_computes(mixture, quantized, "safetensors", "transformers")
    bundle = mixture.bundle("safetensors", quantized, dtype="float32")
    assert disagreements(bundle) == []
    groups = config_groups(bundle)
    (of_experts,) = (group for group in groups.values() if group["weights"]["symmetric"])
    assert of_experts["targets"] == [r"re:.*\.mlp\.experts\.\d+\."]
    assert of_experts is groups["group_0"]
    assert len(groups) == 3


def test_onnx_takes_experts_without_zero_points(mixture):
    quantized = mixture.quantized(AUTO | {"method": "gptq"})
    assert_computes(mixture, quantized, "onnx", "onnxruntime")


def test_fused_experts_can_have_whole_rows(fused):
    quantized = fused.quantized(AUTO | {"method": "rtn"})
    assert grids(quantized, ".experts.") == {(64, True), (80, True)}
    assert grids(quantized, "self_attn") == {(64, False)}
    bundle = fused.bundle("safetensors", quantized)
    assert differing(CONTAINER, bundle, fused.checkpoint, quantized) == []
    assert disagreements(bundle) == []
    groups = config_groups(bundle)
    assert groups["group_0"]["weights"]["strategy"] == "channel"
    assert groups["group_1"]["targets"] == ["Linear"]
    found = open_runtime("transformers", bundle, 1).logprobs(fused.tokens)
    source = open_runtime("transformers", fused.checkpoint.folder, 1).logprobs(fused.tokens)
    assert 0 < np.abs(found - source).mean() < 0.1


def test_zero_points_that_are_stated_are_refused_in_experts(mixture, tmp_path):
    quantized = mixture.quantized(AUTO | {"method": "rtn", "symmetric": False})
    with pytest.raises(StageError, match="set symmetric: auto in the recipe") as caught:
        write_variant("safetensors", tmp_path / "out", mixture.checkpoint, quantized)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


@pytest.mark.parametrize("method", METHODS)
def test_auto_gives_the_bits_of_groups_that_are_stated(tmp_path, method):
    family = FamilyModel(tmp_path, "llama", hidden_size=128, intermediate_size=128)
    chosen = family.quantized(AUTO | {"method": method})
    stated = {"method": method, "bits": 4, "group_size": 128, "symmetric": False}
    expected = family.quantized(stated)
    assert chosen.linears == expected.linears
    for name in chosen.linears:
        ours, theirs = chosen.linear(name), expected.linear(name)
        assert ours.describe() == theirs.describe()
        for part, values in ours.parts().items():
            assert np.array_equal(values, theirs.parts()[part]), (name, part)
    assert chosen.report["layers"] == expected.report["layers"]
    assert "grids" not in expected.report["transforms"][-1]


def test_what_was_chosen_is_told(dense, mixture):
    recipe = AUTO | {"method": "rtn", "embedding_bits": None}
    report = dense.quantized(recipe).report
    counts = {"groups of 64": 12, "whole rows": 2}
    assert report["transforms"][-1] == {
        "step": "quantize",
        **parse_recipe(recipe).model_dump(mode="json"),
        "grids": counts,
    }
    words = "groups of 64 (12 layers), whole rows (2 layers)"
    assert describe_grids(counts) == words
    assert words in summarize(report, parse_recipe(recipe)).text
    assert "groups of 32, symmetric" in grid_counts(mixture.quantized(recipe).report["layers"])


def test_a_budget_chooses_among_what_fits(mixture):
    budget = {"bits": [3, 4], "group_sizes": [32, 64, 128]}
    recipe = AUTO | {"method": "rtn", "budget": budget}
    quantized = mixture.quantized(recipe)
    assert {symmetric for _, symmetric in grids(quantized, ".experts.")} == {True}
    assert {symmetric for _, symmetric in grids(quantized, "self_attn")} == {False}
    (step,) = (step for step in quantized.report["transforms"] if step["step"] == "budget")
    assert "predicted_without" in step
