"""Statistics of the two ends of a model: final states, the embedding's G, token frequencies."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from quantline.calibration import embedding_and_head
from quantline.calibration.embedding_and_head import (
    TOKENS,
    embedding_fisher,
    embedding_sums,
    final_states,
    keep_embedding_moments,
    token_frequencies,
)
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import tokens_of


def test_final_states_are_evenly_spread_over_the_text(tiny_narrow, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_and_head, "SAMPLE_TOKENS", 48)
    checkpoint = Checkpoint(tiny_narrow)
    tokens = tokens_of(checkpoint, 6, 32)
    store = calibrate_into(tmp_path / "calibration", checkpoint, tokens)
    states = final_states(store.folder)
    hidden = final_hidden_states(checkpoint, tokens, "test").reshape(tokens.size, -1)
    assert states.dtype == np.float32
    assert states.shape == (48, 64)
    assert np.allclose(states, hidden[::4], rtol=1e-3, atol=1e-3 * np.abs(hidden).max(0))


def test_embedding_fisher_is_the_second_moment_of_the_gradients(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 50, 12, generator=generator) for _ in range(3)]
    keep_embedding_moments(embedding_sums(batches, 12, ()), tmp_path)
    fisher_out = embedding_fisher(tmp_path)
    assert fisher_out.shape == (1, 12, 12)
    rows = torch.cat(batches).reshape(-1, 12).double().numpy()
    moments = rows.T @ rows / len(rows)
    assert np.trace(fisher_out[0]) == pytest.approx(np.trace(moments), rel=1e-3)
    # Shrunk towards a multiple of the identity.
    smaller = np.abs(np.triu(fisher_out[0], 1)) <= np.abs(np.triu(moments, 1)) + 1e-3
    assert smaller.all()


def test_token_frequencies_count_one_more_of_each_token(tmp_path):
    tokens = np.array([[0, 3, 3], [3, 1, 0]], np.int32)
    save_file({"tokens": tokens}, tmp_path / TOKENS)
    expected = np.array([3, 2, 1, 4, 1]) / 11
    assert np.allclose(token_frequencies(tmp_path, 5), expected)
