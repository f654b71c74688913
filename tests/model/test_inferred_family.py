"""Families without a table run block by block where their blocks are alike, or are refused."""

from dataclasses import replace

import pytest

from quantline.config.recipes import RECIPES
from quantline.errors import Failure, StageError
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.model.find_family import family_of
from quantline.model.inferred_family import infer_family
from tests.helpers.granite import MULTIPLIERS


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("olmo2", {}),
        ("stablelm", {"tie_word_embeddings": False}),
        ("cohere", {}),
        ("granite", MULTIPLIERS),
    ],
)
def test_infer_family_runs_block_by_block(family, sizes, tmp_path, make_model):
    folder = make_model(tmp_path / "model", family, hidden_size=64, **sizes)
    checkpoint = Checkpoint(folder)
    verify.check_config(folder, "a converter")
    assert verify.check_checkpoint(folder)["sizes"]["hidden"] == 64
    verify.check_blocks(checkpoint)
    linears = {f"{name}.weight" for name in checkpoint.arch.linears()}
    assert linears
    assert linears <= set(checkpoint.names)
    # What the family does to its logits counts too.
    checkpoint.arch = replace(checkpoint.arch, logit_scale=1.5)
    with pytest.raises(StageError, match="run block by block to be transformers' own") as error:
        verify.check_blocks(checkpoint)
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_check_blocks_refuses_blocks_that_are_called_otherwise(tmp_path, make_model):
    """Bloom's blocks give tuples, and take more than hidden states from each other."""
    sizes = {"hidden_size": 64, "num_key_value_heads": None, "intermediate_size": None}
    folder = make_model(tmp_path / "model", "bloom", **sizes)
    with pytest.raises(StageError, match="bloom does not run block by block") as error:
        verify.check_blocks(Checkpoint(folder))
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_quantize_block_refuses_layers_that_no_scale_can_be_folded_into(tmp_path, make_model):
    from quantline.recipes.context import QuantizationContext
    from quantline.recipes.quantize_block import quantize_block

    checkpoint = Checkpoint(make_model(tmp_path / "model", "granite", **MULTIPLIERS))
    options = {"method": "awq", "bits": 4, "group_size": 32, "symmetric": False}
    recipe = RECIPES["awq"].model_validate(options)
    context = QuantizationContext(recipe, checkpoint, checkpoint.arch, None, None)
    expected = "expected layers of granite that scales can be folded into"
    with pytest.raises(StageError, match=expected) as error:
        quantize_block(context, 0)
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


@pytest.mark.parametrize("family", ["olmoe", "mamba", "nonsense"])
def test_infer_family_knows_none_for_what_does_not_run_block_by_block(family):
    config = {"model_type": family, "num_hidden_layers": 2, "hidden_size": 64}
    assert infer_family(config) is None
    assert family_of(config) is None


def test_check_blocks_takes_no_lack_of_memory_for_a_model_that_does_not_run(
    tmp_path, make_model, monkeypatch
):
    def allocate(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr("quantline.model.block_runner.full_model_logits", allocate)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        verify.check_blocks(Checkpoint(make_model(tmp_path / "model", num_hidden_layers=1)))
