"""What benchmarks/real_models makes of packaged files."""

import json

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from benchmarks.real_models import packages
from benchmarks.real_models.noise import with_noise
from benchmarks.real_models.texts import read_code


def dequantized(kind: str, seed: int = 0) -> np.ndarray:
    """Return a weight float32 [64, 96] that lies on the grid of a type."""
    weight = np.random.default_rng(seed).standard_normal((64, 96)).astype(np.float32)
    of_type = gguf.GGMLQuantizationType[kind]
    return dequantize(quantize(weight, of_type), of_type)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_noise_moves_weights_by_up_to_half_a_step_of_their_grid(kind):
    weight = dequantized(kind)
    noisy = with_noise(weight, np.random.default_rng(1))
    blocks = weight.reshape(-1, 32)
    # In each block some neighbours on the grid are taken, so the step is their distance.
    steps = np.array([np.diff(np.unique(block)).min() for block in blocks])[:, None]
    moves = (noisy - weight).reshape(-1, 32) / steps
    assert np.abs(moves).max() <= 0.501
    assert moves.std() == pytest.approx(12**-0.5, rel=0.05)


def test_noise_leaves_what_was_not_rounded_to_four_bits():
    generator = np.random.default_rng(1)
    for weight in (dequantized("Q8_0"), np.ones(96, np.float32), np.zeros((4, 48), np.float32)):
        np.testing.assert_array_equal(with_noise(weight, generator), weight)


@pytest.mark.slow
def test_a_package_with_another_sha256_is_refused(tmp_path, monkeypatch):
    pinned = tmp_path / "packages.json"
    pinned.write_text(json.dumps({"chatterbot-corpus==1.3.3": "0" * 64}))
    monkeypatch.setattr(packages, "PINNED", pinned)
    with (
        pytest.raises(SystemExit, match="expected to download chatterbot-corpus"),
        packages.wheel("chatterbot-corpus==1.3.3"),
    ):
        pass


def test_code_is_one_document_for_each_module():
    texts = read_code()
    assert len(texts) == len({text[:200] for text in texts}) > 10
    assert not any("\n\n" in text for text in texts)
