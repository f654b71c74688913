"""Gradients go through what blocks leave for later blocks, as through the whole model."""

import numpy as np
import pytest
import torch

from quantline.calibration.output_moments import OutputMoments, backward
from quantline.ingest import verify
from quantline.model.activation_store import ActivationStore
from quantline.model.block_runner import BlockRun
from quantline.model.checkpoint import Checkpoint
from quantline.model.shared_state import SharedState
from tests.helpers.models import transformers_model

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 384},
    **{"hidden_size_per_layer_input": 32, "sliding_window": 16, "global_head_dim": 16},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model) -> Checkpoint:
    """Two blocks leave keys and values that two later ones read."""
    folder = make_model(tmp_path_factory.mktemp("shared") / "model", "gemma4_text", **SIZES)
    return Checkpoint(folder, structure=verify.check_blocks(Checkpoint(folder)))


def test_gradients_of_shared_keys_are_those_of_the_whole_model(checkpoint, tmp_path):
    tokens = np.random.default_rng(0).integers(3, 380, (3, 12)).astype(np.int32)
    run = BlockRun(checkpoint, tokens, rows=2)
    assert run.shares_state
    states = ActivationStore(tmp_path / "states", run.arch.layers + 1, run.hidden)
    states.put(0, run.hidden)
    run.forward("test", after=lambda block: states.put(block + 1, run.hidden))
    gradients = run.hidden.like()
    slope = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(1))
    gradients[0], gradients[1] = slope[:2].clone(), slope[2:].clone()
    found = {}
    moments = OutputMoments(8, lambda layer, fisher_out, shrinkage: None)
    add = moments.add

    def keep(layer, gradient):
        found.setdefault(layer, []).append(gradient.reshape(-1, gradient.shape[-1]))
        add(layer, gradient)

    moments.add = keep
    backward(run, states, gradients, moments, run.arch.layers - 1)

    model = transformers_model(checkpoint.folder)
    leaving = {}
    model.model.layers[-1].register_forward_hook(lambda m, a, out: leaving.update(out=out))
    expected = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("layers."):

            def after(module, args, out, name=name):
                if out.requires_grad:
                    out.register_hook(lambda gradient: expected.update({name: gradient}))

            module.register_forward_hook(after)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(input_ids=torch.from_numpy(tokens).long(), use_cache=False)
    leaving["out"].backward(slope)
    assert sorted(found) == sorted(f"model.{name}" for name in expected)
    for name, gradient in expected.items():
        ours = torch.cat(found[f"model.{name}"])
        theirs = gradient.reshape(-1, gradient.shape[-1])
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max())), name


def test_shared_state_keeps_what_was_read_and_what_came_last():
    state = SharedState({"given": 7})
    for block, value in enumerate((1.0, 2.0, 3.0)):
        state.begin(block, backward=False)
        assert state["given"] == 7
        if block == 2:
            assert state["k"].item() == 2.0
        state["k"] = torch.tensor(value)
        assert state["k"].item() == value
    assert [version.block for version in state._versions["k"]] == [1, 2]
    state.begin(2, backward=True)
    assert state["k"].item() == 2.0  # what was there before it ran
    state.begin(0, backward=True)
    assert "k" not in state
    with pytest.raises(KeyError):
        state["k"]


def test_shared_state_begins_again_with_what_was_given():
    state = SharedState({"given": 7})
    state.begin(0, backward=False)
    state["k"] = torch.tensor(1.0)
    state.begin(1, backward=False)
    assert state["k"] == 1.0
    state.begin_again()
    state.begin(0, backward=False)
    assert list(state) == ["given"] and state["given"] == 7
    state["k"] = torch.tensor(2.0)
    state.begin(1, backward=False)
    assert state["k"] == 2.0
    assert [version.block for version in state._versions["k"]] == [0]
