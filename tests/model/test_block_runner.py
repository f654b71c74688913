"""Running block by block gives what the model gives as a whole."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from quantline.model import block_runner
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.model.whole_model import full_model_logits
from tests.helpers.models import transformers_model
from tests.helpers.sizes import KINDS, SMALL
from tests.helpers.tensor_files import edit_json


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 380, (5, 40)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_final_hidden_states_are_those_of_transformers(
    kind, make_model, tmp_path, tokens, monkeypatch
):
    import torch

    folder = make_model(tmp_path / "model", **SMALL, **KINDS[kind])
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 80)  # batches of 2, 2 and 1
    hidden = final_hidden_states(Checkpoint(folder), tokens, "test")
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        expected = transformers_model(folder).base_model(input_ids=ids).last_hidden_state.numpy()
    assert hidden.dtype == np.float32
    assert hidden.shape == (5, 40, 64)
    assert np.abs(hidden - expected).max() < 1e-5 < np.abs(expected).mean()


@pytest.mark.parametrize("kind", ["llama", "llama with biases", "gpt2", "mixtral"])
def test_full_model_logits_are_those_of_transformers_and_of_the_blocks(
    kind, make_model, tmp_path, tokens
):
    import torch

    folder = make_model(tmp_path / "model", **SMALL, **KINDS[kind])
    checkpoint = Checkpoint(folder)
    logits = full_model_logits(checkpoint, tokens)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        expected = transformers_model(folder)(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    hidden = final_hidden_states(checkpoint, tokens, "test")
    head = OutputHead.of(checkpoint).to_torch(device())
    by_blocks = head.logits(torch.from_numpy(hidden).to(device())).cpu()
    assert torch.allclose(logits, by_blocks, atol=1e-4)


def test_final_hidden_states_hold_the_weights_of_one_block_at_a_time(make_model, tmp_path, tokens):
    ran = []

    @contextmanager
    def watch(prefix, block):
        assert not any(parameter.is_meta for parameter in block.parameters())
        for earlier in ran:
            assert all(parameter.is_meta for parameter in earlier.parameters())
        ran.append(block)
        yield

    checkpoint = Checkpoint(make_model(tmp_path / "model", **SMALL))
    final_hidden_states(checkpoint, tokens, "test", watch)
    assert len(ran) == 3
    for block in ran:
        parameters = list(block.parameters())
        assert parameters
        assert all(parameter.is_meta for parameter in parameters)


def test_final_hidden_states_run_no_code_of_the_checkpoint(tiny_model, tmp_path, tokens):
    folder = tmp_path / "model"
    flag = tmp_path / "it-ran"
    shutil.copytree(tiny_model, folder)
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Model: pass\n")
    auto_map = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", auto_map=auto_map)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map
    final_hidden_states(Checkpoint(folder), tokens, "test")
    assert not flag.exists()
