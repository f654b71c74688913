"""transformers as a runtime: the numbers of torch, its own greedy decoding, no random weights."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantline.errors import StageError
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from quantline.runtimes.smoke.tokenizer_parity import TEXTS, compare_tokenizers
from quantline.text.tokenizer import Tokenizer
from tests.helpers.quantized import (
    rounded,
    tokens_of,
    torch_greedy,
    torch_logprobs,
    torch_model,
)
from tests.helpers.variants import write_variant


@pytest.fixture(scope="module")
def engine(tiny_model):
    return open_runtime("transformers", tiny_model, 1)


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):
    source = Checkpoint(tiny_model)
    folder = tmp_path_factory.mktemp("plain")
    return torch_model(source, rounded(folder / "q", source, bits=0))


def test_logprobs_are_torchs_in_float32(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model))
    logprobs = engine.logprobs(tokens)
    assert logprobs.dtype == np.float32
    assert logprobs.shape == (2, 20, 384)
    assert np.array_equal(logprobs, torch_logprobs(reference, tokens))
    assert np.allclose(np.exp(logprobs).sum(-1), 1, atol=1e-5)
    assert (engine.name, engine.device) == ("transformers", "cpu")


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a mode of MKL")
def test_what_is_measured_is_the_same_for_any_number_of_threads(engine, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), 5, 61)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            logits = [logits for _, _, logits in engine.logit_chunks(tokens, 0, 60)]
            found.append([engine.logprobs(tokens), *logits])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(np.array_equal, other, found[0]))


def test_generate_is_transformers_own_greedy_decoding(engine, reference, tiny_model):
    tokens = tokens_of(Checkpoint(tiny_model), batch=1, length=9)
    prompt = tokens[0].tolist()
    expected = torch_greedy(reference, tokens, 12)
    assert engine.generate(prompt, 12, set()) == expected
    stop = expected[5]
    assert engine.generate(prompt, 12, {stop}) == expected[: expected.index(stop)]


def test_encode_gives_the_sources_ids(engine, tiny_model):
    assert compare_tokenizers(engine, Tokenizer(tiny_model)) == ([], len(TEXTS))
    text = "ada met <|im_end|> hugo"
    assert engine.decode(engine.encode(text)) == text


@pytest.mark.parametrize("bits", [0, 4])
def test_engine_refuses_a_missing_weight_and_draws_no_random_one(tmp_path, tiny_model, bits):
    source = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", source, bits)
    write_variant("safetensors", tmp_path / "out", source, quantized)
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    fewer = {name: tensors[name] for name in tensors if "layers.1.mlp.up_proj" not in name}
    assert len(fewer) < len(tensors)
    save_file(fewer, path, metadata={"format": "pt"})
    words = r"expected transformers to find every weight .* found .*layers\.1\.mlp\.up_proj"
    with pytest.raises(StageError, match=words) as caught:
        open_runtime("transformers", tmp_path / "out", 1)
    assert caught.value.failure == "runtime_crashed"


def test_engine_keeps_progress_bars_of_others_out_of_the_output(tmp_path, tiny_model, capfd):
    source = Checkpoint(tiny_model)
    write_variant("safetensors", tmp_path / "out", source, rounded(tmp_path / "q", source))
    open_runtime("transformers", tmp_path / "out", 1).generate([1, 2, 3], 2, set())
    assert capfd.readouterr() == ("", "")


def test_engine_never_runs_a_checkpoints_own_code(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m/modeling_evil.py").write_text("raise SystemExit('ran')\n")
    path = tmp_path / "m/config.json"
    auto_map = (
        '{"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", '
        '"AutoConfig": "modeling_evil.Config"},'
    )
    config = path.read_text().replace('"llama"', '"evil"')
    path.write_text(config.replace("{", auto_map, 1))
    with pytest.raises((StageError, ValueError), match=r"trust_remote_code|custom code|'evil'"):
        open_runtime("transformers", tmp_path / "m", 1)
