"""An output head in integers: what safetensors hold, and what transformers computes with."""

import json

import numpy as np
import pytest

from quantline.config.recipes import parse_recipe
from quantline.config.variants import Variant, misfits
from quantline.errors import Failure, StageError
from quantline.formats.container import load_container
from quantline.inputs.recipes import check_recipe
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.rounded_head import check_head, head_misfit
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import differing, rounded, tokens_of, torch_logprobs, torch_model
from tests.helpers.variants import write_variant

CONTAINER = load_container("safetensors")
RECIPE = {"name": "head", "safetensors_head": True}
HEAD = "lm_head"


def recipe_of(**options):
    return parse_recipe(
        {"method": "rtn", "bits": 4, "group_size": "auto", "symmetric": False} | options
    )


@pytest.mark.parametrize(("bits", "head_bits"), [(4, 8), (4, 4), (3, 8)])
def test_write_holds_a_head_in_integers_and_transformers_computes_with_it(
    tmp_path, tiny_narrow, bits, head_bits
):
    source = Checkpoint(tiny_narrow)
    quantized = rounded(tmp_path / "q", source, bits, "auto", recipe=RECIPE, outside=head_bits)
    requested = write_variant("safetensors", tmp_path / "out", source, quantized)
    assert differing(CONTAINER, tmp_path / "out", source, quantized) == []
    stored = CONTAINER.read_back(tmp_path / "out", source)
    assert requested[f"{HEAD}.weight"] == stored[f"{HEAD}.weight"].type == f"int{head_bits}"
    assert stored[source.arch.embedding].type not in ("int4", "int8")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert HEAD not in config["ignore"]
    named = [group for group in config["config_groups"].values() if HEAD in group["targets"]]
    assert [group["weights"]["num_bits"] for group in named] == [head_bits]
    tokens = tokens_of(source)
    found = open_runtime("transformers", tmp_path / "out", 1).logprobs(tokens)
    held = quantized.with_outside([HEAD])
    assert np.array_equal(found, torch_logprobs(torch_model(source, held), tokens))


def test_write_keeps_a_head_in_floats_unless_the_recipe_asks(tmp_path, tiny_narrow):
    source = Checkpoint(tiny_narrow)
    quantized = rounded(tmp_path / "q", source, group_size="auto", outside=8)
    write_variant("safetensors", tmp_path / "out", source, quantized)
    assert not CONTAINER.read_back(tmp_path / "out", source)[f"{HEAD}.weight"].type.startswith(
        "int"
    )


def test_check_head_refuses_a_head_that_is_the_embedding(tiny_model):
    with pytest.raises(StageError, match="which is the embedding too") as caught:
        check_head("mine", recipe_of(safetensors_head=True), Checkpoint(tiny_model))
    assert caught.value.failure is Failure.UNSUPPORTED_ARCHITECTURE
    assert head_misfit("mine", recipe_of(), Checkpoint(tiny_model)) is None


def test_check_head_refuses_rows_in_one_group(tiny_narrow):
    recipe = recipe_of(safetensors_head=True, group_size=-1)
    assert "that groups divide" in str(head_misfit("mine", recipe, Checkpoint(tiny_narrow)))


def test_check_recipe_says_before_the_run_that_a_tied_head_fails(tiny_model):
    said = check_recipe("mine", recipe_of(safetensors_head=True), Checkpoint(tiny_model), None)
    assert "recipes.mine is going to fail, and the others go on" in str(said)
    assert "recipes.mine.safetensors_head=false" in str(said)


def test_other_layouts_take_no_head_in_integers():
    variant = Variant(recipe="mine", format="safetensors", runtime="transformers", layout="gptq")
    (said,) = misfits(variant, {"mine": recipe_of(safetensors_head=True)})
    assert said.startswith(".layout: a head in integers")
    assert not list(misfits(variant, {"mine": recipe_of()}))


def test_a_recipe_without_bits_for_the_head_is_refused():
    with pytest.raises(ValueError, match="embedding_bits of 8 or 4"):
        recipe_of(safetensors_head=True, embedding_bits=None)
