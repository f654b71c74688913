"""transformers alone loads a bundle if it can; whether it could is found by trying, and kept."""

import pytest
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.files import write_json
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes import load_model
from quantline.runtimes.runtime import open_runtime
from tests.helpers.quantized import activations_rounded, rounded
from tests.helpers.tensor_files import write_tensors
from tests.helpers.variants import write_variant

FUSED = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory, make_model):
    """A bundle whose experts transformers wants in one tensor."""
    root = tmp_path_factory.mktemp("fused")
    make_model(root / "model", "gpt_oss", **FUSED)
    structure = verify.check_blocks(Checkpoint(root / "model"))
    source = Checkpoint(root / "model", structure=structure)
    write_variant("safetensors", root / "out", source, rounded(root / "q", source, symmetric=True))
    return root / "out"


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_layout_whose_package_is_missing_is_named(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(load_model, "find_spec", lambda name: None)
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": layout}})
    with pytest.raises(StageError, match="there is no gptqmodel; install") as error:
        load_model.load_model(tmp_path, None)
    assert error.value.failure is Failure.RUNTIME_UNAVAILABLE


def test_what_transformers_loads_by_itself_gets_no_help(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(load_model, "without_needless_initialization", None)
    source = Checkpoint(tiny_model)
    write_variant("safetensors", tmp_path / "packed", source, rounded(tmp_path / "q", source))
    assert open_runtime("transformers", tmp_path / "packed", 1).helped is None
    eight = activations_rounded(tmp_path / "e", source, "float8")
    write_variant("safetensors", tmp_path / "eight", source, eight)
    assert open_runtime("transformers", tmp_path / "eight", 1).helped is None


def test_what_it_does_not_find_is_said_and_tried_once(fused, monkeypatch):
    helped = open_runtime("transformers", fused, 1).helped
    assert "missing keys, 2 in all, such as model.layers.0.mlp.experts.down_proj; unex" in helped
    write_json(fused / "smoke.json", {"helped": helped})
    tried = load_model._tried
    calls = []
    monkeypatch.setattr(load_model, "_tried", lambda *a: calls.append(a) or tried(*a))
    try:
        assert open_runtime("transformers", fused, 1).helped == helped
        assert len(calls) == 1
    finally:
        (fused / "smoke.json").unlink()


def test_a_layer_that_is_missing_is_an_error_with_help_as_without(fused, tiny_model, tmp_path):
    source = Checkpoint(tiny_model)
    write_variant("safetensors", tmp_path / "dense", source, rounded(tmp_path / "q", source))
    for folder, layer in ((fused, "mlp.experts.1.up_proj"), (tmp_path / "dense", "mlp.up_proj")):
        tensors = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in tensors.items() if f"0.{layer}." not in name}
        assert len(kept) < len(tensors)
        write_tensors(folder / "model.safetensors", kept)
        with pytest.raises(StageError, match="find every weight") as caught:
            open_runtime("transformers", folder, 1)
        assert caught.value.failure == Failure.RUNTIME_CRASHED
        write_tensors(folder / "model.safetensors", tensors)
