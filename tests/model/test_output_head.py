"""The output head: one formula in numpy and in torch, with all that a family does to it."""

from itertools import product

import numpy as np
import pytest
import torch

from quantline.model import output_head
from quantline.model.checkpoint import Checkpoint
from quantline.model.output_head import FILE, OutputHead, open_head
from tests.helpers.models import transformers_model
from tests.helpers.tensor_files import write_tensors

VOCABULARY = 11
WIDTH = 5
# scale, softcap, whether there is a bias
OPTIONS = list(product((1.0, 0.5), (None, 2.0), (False, True)))


def random_head(scale: float, softcap: float | None, biased: bool) -> OutputHead:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    bias = generator.normal(size=VOCABULARY).astype(np.float32) if biased else None
    return OutputHead(weight, scale, softcap, bias)


def random_hidden(tokens: int = 7, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(tokens, width)).astype(np.float32)


@pytest.mark.parametrize(("scale", "softcap", "biased"), OPTIONS)
def test_logits_are_the_same_in_numpy_and_in_torch(scale, softcap, biased, monkeypatch):
    monkeypatch.setattr(output_head, "BLOCK_VALUES", 3 * WIDTH)  # blocks of 3 tokens
    head = random_head(scale, softcap, biased)
    hidden = random_hidden()
    by_numpy = head.logits(hidden)
    by_torch = head.to_torch(torch.device("cpu")).logits(torch.from_numpy(hidden))
    assert by_numpy.dtype == np.float32
    assert by_numpy.shape == (7, VOCABULARY)
    assert np.allclose(by_numpy, by_torch.numpy(), atol=1e-6)

    expected = hidden.astype(np.float64) @ head.weight.T
    if biased:
        expected = expected + head.bias
    expected = expected * scale
    if softcap:
        expected = softcap * np.tanh(expected / softcap)
    assert np.allclose(by_numpy, expected, atol=1e-5)
    logprobs = np.log(np.exp(expected) / np.exp(expected).sum(1, keepdims=True))
    assert np.allclose(head.logprobs(hidden), logprobs, atol=1e-5)


@pytest.mark.parametrize(("scale", "softcap", "biased"), OPTIONS)
def test_logits_and_slope_gives_autograds_derivative(scale, softcap, biased):
    head = random_head(scale, softcap, biased).to_torch(torch.device("cpu"))
    hidden = torch.from_numpy(random_hidden())
    logits, slope = head.logits_and_slope(hidden)
    # hidden · weightᵀ as a variable of its own: a head whose weight is the identity.
    products = (hidden @ head.weight.T).requires_grad_(True)
    by_products = OutputHead(torch.eye(VOCABULARY), scale, softcap, head.bias)
    recomputed = by_products.logits(products)
    assert torch.allclose(recomputed, logits, atol=1e-6)
    recomputed.sum().backward()
    assert products.grad is not None
    slopes = torch.as_tensor(slope).expand_as(products)
    assert torch.allclose(slopes, products.grad, atol=1e-6)


@pytest.mark.parametrize("block_values", [1, 3 * WIDTH, 1 << 21])
def test_blocks_cover_the_vocabulary_in_even_parts(block_values, monkeypatch):
    monkeypatch.setattr(output_head, "BLOCK_VALUES", block_values)
    head = random_head(0.5, 2.0, True)
    covered = []
    for block in head.blocks():
        covered += range(VOCABULARY)[block]
    assert covered == list(range(VOCABULARY))
    sizes = {len(range(VOCABULARY)[block]) for block in head.blocks()[:-1]}
    assert len(sizes) <= 1
    hidden = random_hidden()
    for block in head.blocks():
        assert np.array_equal(head.block(hidden, block), head.logits(hidden)[:, block])


@pytest.mark.parametrize("resident_values", [0, 1 << 26])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_open_head_reads_every_float_type_from_a_file(
    dtype, resident_values, tmp_path, monkeypatch
):
    """A head that is larger than RESIDENT_VALUES is read and widened block by block."""
    import ml_dtypes

    monkeypatch.setattr(output_head, "RESIDENT_VALUES", resident_values)
    monkeypatch.setattr(output_head, "BLOCK_VALUES", 3 * WIDTH)
    types = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    original = random_head(0.5, 2.0, True)
    weight = original.weight.astype(types[dtype])
    write_tensors(tmp_path / FILE, {"weight": weight, "bias": original.bias})
    head = open_head(tmp_path, {"logit_scale": 0.5, "logit_softcap": 2.0})
    assert isinstance(head.weight, np.ndarray) == bool(resident_values)
    assert len(head) == VOCABULARY
    expected = OutputHead(weight.astype(np.float32), 0.5, 2.0, original.bias)
    hidden = random_hidden()
    assert np.array_equal(head.logits(hidden), expected.logits(hidden))
    on_torch = head.to_torch(torch.device("cpu"))
    assert np.array_equal(on_torch.weight.numpy(), weight.astype(np.float32))


def test_open_head_takes_a_head_without_a_bias(tmp_path):
    write_tensors(tmp_path / FILE, {"weight": random_head(1.0, None, False).weight})
    assert open_head(tmp_path, {"logit_scale": 1.0, "logit_softcap": None}).bias is None


PHI = {"num_key_value_heads": 4, "tie_word_embeddings": False}
GEMMA = {"sliding_window": 16, "final_logit_softcapping": 0.5}


@pytest.mark.parametrize(
    ("family", "settings", "scale", "softcap", "biased"),
    [
        ("llama", {}, 1.0, None, False),
        ("phi", PHI, 1.0, None, True),
        ("gemma2", GEMMA, 1.0, 0.5, False),
        ("cohere", {"logit_scale": 0.25}, 0.25, None, False),
    ],
)
def test_output_head_of_a_checkpoint_gives_transformers_logits(
    family, settings, scale, softcap, biased, make_model, tmp_path
):
    folder = make_model(
        tmp_path / "model", family, hidden_size=64, intermediate_size=96, **settings
    )
    head = OutputHead.of(Checkpoint(folder))
    assert (head.scale, head.softcap, head.bias is not None) == (scale, softcap, biased)
    model = transformers_model(folder)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state[0].numpy()
        expected = model(input_ids=tokens).logits[0].numpy()
    assert np.allclose(head.logits(hidden), expected, atol=1e-5)
