"""Every family in safetensors: transformers loads what was written, or writing is refused."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.container import load_container
from quantline.runtimes.runtime import open_runtime
from tests.helpers.families import GPTQ_CURVATURE, INT8, WITH_EXPERTS
from tests.helpers.quantized import (
    activations_rounded,
    differing,
    rounded,
    torch_logprobs,
    torch_model,
)
from tests.helpers.variants import write_variant

CONTAINER = load_container("safetensors")


def assert_refused(family, quantized, folder, words, **options):
    """Writing is refused by name, and nothing is written."""
    with pytest.raises(StageError, match=words) as caught:
        write_variant("safetensors", folder, family.checkpoint, quantized, **options)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert not list(folder.iterdir())


@pytest.mark.parametrize("recipe", [GPTQ_CURVATURE, INT8], ids=["curvature", "int8"])
def test_safetensors_write_packs_integers_that_transformers_loads(family, recipe, tmp_path):
    checkpoint = family.checkpoint
    if family.arch.family.transposed:
        quantized = family.quantized(recipe)
        words = "has as Conv1D and loads from no layout"
        assert_refused(family, quantized, tmp_path / "out", words)
        return
    if family.arch.experts and recipe["method"] == "gptq":
        recipe = recipe | {"symmetric": True}
    quantized = family.quantized(recipe)
    bundle = family.bundle("safetensors", quantized)
    assert differing(CONTAINER, bundle, checkpoint, quantized) == []
    found = open_runtime("transformers", bundle, 1).logprobs(family.tokens)
    # transformers expands experts in the precision of their scales.
    model = torch_model(checkpoint, quantized, halved=".experts.")
    assert np.abs(found - torch_logprobs(model, family.tokens)).max() < 1e-5


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_safetensors_write_refuses_experts_that_transformers_does_not_load(
    model_type, family_models, tmp_path
):
    family = family_models(model_type)
    checkpoint = family.checkpoint
    symmetric = rounded(tmp_path / "symmetric", checkpoint, 4, 32, symmetric=True)
    asymmetric = rounded(tmp_path / "asymmetric", checkpoint, 4, 32)
    int8 = activations_rounded(tmp_path / "int8", checkpoint, "int8")
    assert_refused(family, asymmetric, tmp_path / "a", "which transformers does not take")
    assert_refused(family, symmetric, tmp_path / "b", "found gptq", layout="gptq")
    assert_refused(family, symmetric, tmp_path / "c", "found awq", layout="awq")
    assert_refused(family, int8, tmp_path / "d", "int8 with rounded activations")
    float8 = activations_rounded(tmp_path / "float8", checkpoint, "float8")
    write_variant("safetensors", tmp_path / "out", checkpoint, float8)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(family.tokens)
    expected = torch_logprobs(torch_model(checkpoint, float8), family.tokens)
    assert np.abs(found - expected).mean() < 0.05  # attention rounds its inputs


def test_safetensors_write_in_another_dtype_is_loaded_as_it_was_made(family):
    bundle = family.bundle("safetensors", family.unquantized, dtype="float32")
    assert differing(CONTAINER, bundle, family.checkpoint, family.unquantized) == []
    found = open_runtime("transformers", bundle, 1).logprobs(family.tokens)
    assert np.array_equal(found, family.logprobs)
