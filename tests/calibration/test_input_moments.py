"""Second moments of inputs are those of transformers' own model, and sums lose nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from quantline.calibration.collect import collect_statistics
from quantline.calibration.input_moments import InputMoments
from quantline.calibration.packing import unpack
from quantline.model import block_runner
from quantline.model.checkpoint import Checkpoint
from tests.helpers.models import transformers_model
from tests.helpers.sizes import KINDS, SMALL

PARTS = ("diagonal", "triangle", "peak", "sample")


def linears_in(prefix: str, block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers of a block by their names."""
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 380, (5, 40)).astype(np.int32)


def stored_inputs(folder) -> dict[str, np.ndarray]:
    """Return all tensors of the inputs' files."""
    tensors = {}
    for path in folder.glob("inputs-*.safetensors"):
        tensors |= load_file(path)
    return tensors


def collect_into(statistics: dict[str, tuple[np.ndarray, dict]]) -> Callable[..., None]:
    """Return a `keep` that puts what it is given into a dictionary."""

    def keep(layer: str, hessian: np.ndarray, **more: np.ndarray) -> None:
        statistics[layer] = (hessian, more)

    return keep


def inputs_of_linears(folder, tokens) -> dict[str, torch.Tensor]:
    """Return what every linear layer of transformers' model reads, by the checkpoint's names."""
    from transformers.pytorch_utils import Conv1D

    model = transformers_model(folder)
    inputs = {}

    def listen(name):
        def before(module, args):
            inputs[name] = args[0]

        return before

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            module.register_forward_pre_hook(listen(name))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens.astype(np.int64)))
    return inputs


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen3", "llama with biases", "gemma2", "gemma3", "phi3", "gpt-neox", "gpt2"],
)
def test_input_moments_are_those_of_the_inputs_in_transformers(
    kind, make_model, tmp_path, tokens, monkeypatch
):
    folder = make_model(tmp_path / "model", **SMALL, **KINDS[kind])
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 80)
    checkpoint = Checkpoint(folder)
    layers = collect_statistics(checkpoint, tokens, tmp_path)
    stored = stored_inputs(tmp_path)
    inputs = inputs_of_linears(folder, tokens)
    assert sorted(layers) == sorted(inputs) == sorted(checkpoint.arch.linears())
    for name, tensor in inputs.items():
        rows = tensor.reshape(-1, tensor.shape[-1]).double().numpy()
        assert layers[name]["tokens"] == len(rows) == tokens.size
        key = layers[name]["moments"]
        expected = rows.T @ rows / len(rows)
        size = np.sqrt(np.diagonal(expected))
        hessian = unpack(stored[f"{key}.diagonal"], stored[f"{key}.triangle"])
        difference = (hessian - expected) / np.outer(size, size)
        assert np.abs(difference).max() < 2**-10
        assert np.abs(np.diagonal(difference)).max() < 1e-4
        peak = np.abs(rows).max(0)
        np.testing.assert_allclose(stored[f"{key}.peak"], peak, rtol=1e-4, atol=1e-6)
        sample = stored[f"{key}.sample"]  # rows of the inputs, in their order
        sampled_rows = rows[:: max(1, len(rows) // 128)]
        assert sample.dtype == np.float16
        assert np.allclose(sample * peak, sampled_rows, rtol=1e-3, atol=1e-5)


def test_input_moments_share_one_sum_among_layers_that_read_one_tensor(
    tiny_model, tmp_path, tokens
):
    layers = collect_statistics(Checkpoint(tiny_model), tokens, tmp_path)
    shared: dict[str, list[str]] = {}
    for name, entry in layers.items():
        shared.setdefault(entry["moments"], []).append(name.split(".")[-1])
    of_one_block = [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]
    assert sorted(sorted(group) for group in shared.values()) == sorted(2 * of_one_block)
    expected = {f"{key}.{part}" for key in shared for part in PARTS}
    assert set(stored_inputs(tmp_path)) == expected


def test_input_moments_keep_equal_inputs_apart_that_are_not_one_tensor():
    """What is shared is the tensor, not its values."""
    statistics: dict[str, tuple[np.ndarray, dict]] = {}
    inputs = InputMoments(15, collect_into(statistics))
    block = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    with torch.no_grad():
        block[0].weight.copy_(torch.eye(3))
        block[0].bias.zero_()
        with inputs.watch(linears_in("b", block), block):
            block(torch.ones(2, 5, 3))
            block(torch.ones(1, 5, 3))
    assert sorted(statistics) == ["b.0", "b.1"]
    assert {name: entry["tokens"] for name, entry in inputs.layers.items()} == {
        "b.0": 15,
        "b.1": 15,
    }
    np.testing.assert_array_equal(statistics["b.0"][0], np.ones((3, 3)))


def test_input_moments_keep_small_inputs_beside_large_ones():
    statistics: dict[str, tuple[np.ndarray, dict]] = {}
    inputs = InputMoments(15, collect_into(statistics))
    block = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with torch.no_grad(), inputs.watch(linears_in("b", block), block):
        # Squared 2^26: a float32 sum would swallow every 1 after it.
        block(torch.full((1, 1, 1), 2.0**13))
        for _ in range(64):
            block(torch.ones(1, 1, 1))
    hessian, more = statistics["b.0"]
    assert hessian.item() == np.float32((2.0**26 + 64) / 65)
    assert more["peak"].item() == 2**13


def test_input_moments_of_a_wide_input_are_symmetric():
    statistics: dict[str, tuple[np.ndarray, dict]] = {}
    wide = torch.nn.Linear(600, 3)
    inputs = torch.randn(2, 40, 600, generator=torch.Generator().manual_seed(1)) + 0.5
    moments = InputMoments(160, collect_into(statistics))
    with moments.watch({"block.wide": wide}, wide):
        for batch in (inputs, 2 * inputs):
            wide(batch)
    rows = torch.cat([inputs, 2 * inputs]).reshape(-1, 600).double()
    hessian = statistics["block.wide"][0]
    np.testing.assert_allclose(hessian, (rows.T @ rows / len(rows)).numpy(), atol=1e-5)
    np.testing.assert_array_equal(hessian, hessian.T)
