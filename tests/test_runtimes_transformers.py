"""transformers as a runtime: the numbers of torch, its own greedy decoding, and no random weights."""

import shutil

import numpy as np
import pytest
from rounded import rounded, tokens_of, torch_greedy, torch_logprobs, torch_model
from safetensors.numpy import load_file, save_file

from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.config.params import Variant
from quantline.formats.safetensors import container as safetensors
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.tokenizer_parity import TEXTS, mismatches
from quantline.errors import StageError


@pytest.fixture(scope="module")
def engine(tiny_model):
    return open_runtime("transformers", tiny_model, 1)


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):
    model = Checkpoint(tiny_model)
    return torch_model(model, rounded(tmp_path_factory.mktemp("plain") / "q", model, bits=0))


def test_log_probabilities_are_torchs_in_float32(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model))
    ours = engine.logprobs(tokens)
    assert ours.dtype == np.float32 and ours.shape == (2, 20, 384)
    assert np.array_equal(ours, torch_logprobs(reference, tokens))
    assert np.allclose(np.exp(ours).sum(-1), 1, atol=1e-5)
    assert (engine.name, engine.device) == ("transformers", "cpu")


def test_greedy_decoding_is_generates(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), batch=1, length=9)
    wanted = torch_greedy(reference, tokens, 12)
    assert engine.generate(tokens[0].tolist(), 12, set()) == wanted
    stop = wanted[5]
    assert engine.generate(tokens[0].tolist(), 12, {stop}) == wanted[:wanted.index(stop)]


def test_the_bundles_tokenizer_is_the_sources(engine, tiny_model):
    wrong, compared = mismatches(engine, Tokenizer(tiny_model))
    assert (wrong, compared) == ([], len(TEXTS))
    assert engine.decode(engine.encode("ada met <|im_end|> hugo")) == "ada met <|im_end|> hugo"


@pytest.mark.parametrize("bits", [0, 4])
def test_a_missing_weight_is_an_error_and_not_a_random_one(tmp_path, tiny_model, bits):
    model = Checkpoint(tiny_model)
    (tmp_path / "out").mkdir()
    safetensors.write(model, rounded(tmp_path / "q", model, bits), tmp_path / "out",
                      Variant(recipe="rounded", format="safetensors", runtime="transformers"))
    path = tmp_path / "out/model.safetensors"
    tensors = {name: one for name, one in load_file(path).items() if "layers.1.mlp.up_proj" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"expected every weight .* found .*layers.1.mlp.up_proj") as error:
        open_runtime("transformers", tmp_path / "out", 1)
    assert error.value.failure == "runtime_crashed"


def test_progress_bars_of_others_stay_out_of_the_output(tmp_path, tiny_model, capfd):
    model = Checkpoint(tiny_model)
    (tmp_path / "out").mkdir()
    safetensors.write(model, rounded(tmp_path / "q", model), tmp_path / "out",
                      Variant(recipe="rounded", format="safetensors", runtime="transformers"))
    open_runtime("transformers", tmp_path / "out", 1).generate([1, 2, 3], 2, set())
    assert capfd.readouterr() == ("", "")


def test_a_checkpoints_own_code_is_never_run(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m/modeling_evil.py").write_text("raise SystemExit('ran')\n")
    config = (tmp_path / "m/config.json").read_text()
    evil = config.replace('"llama"', '"evil"').replace("{", '{"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", '
                                                       '"AutoConfig": "modeling_evil.Config"},', 1)
    (tmp_path / "m/config.json").write_text(evil)
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        open_runtime("transformers", tmp_path / "m", 1)
