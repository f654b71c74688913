"""Running block by block gives what the whole model gives, and the second moments are those of its inputs."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.model.architecture import architecture
from quantline.calibration.collect import InputMoments, check, collect
from quantline.calibration.packing import unpack
from quantline.model.checkpoint import Checkpoint
from quantline.errors import Failure, StageError

ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}
KINDS = {
    "llama": {},
    "llama with scaled rope": {"rope_parameters": ROPE},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows in some layers": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
                                          "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 16},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "gpt-neox": {"model_type": "gpt_neox", "tie_word_embeddings": False},
    "gpt-neox one half after the other, all of a head rotated": {
        "model_type": "gpt_neox", "use_parallel_residual": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    "gpt2": {"model_type": "gpt2"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "qwen3-moe with a dense block": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 32, "mlp_only_layers": [1], "norm_topk_prob": True},
    "gpt2 with a head of its own": {"model_type": "gpt2", "tie_word_embeddings": False},
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 380, (5, 40)).astype(np.int32)


def stored(folder) -> dict[str, np.ndarray]:
    """All tensors that `collect` has written."""
    return {name: tensor for path in folder.glob("inputs-*.safetensors") for name, tensor in load_file(path).items()}


def whole(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_the_whole_model(kind, make_model, tmp_path, tokens, monkeypatch):
    import torch

    from quantline.model import block_runner as blocks

    folder = make_model(tmp_path / "model", **SIZES, **KINDS[kind])
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 80)  # batches of 2, 2 and 1
    found = blocks.run_blocks(Checkpoint(folder), tokens, "test")
    with torch.no_grad():
        wanted = whole(folder).base_model(input_ids=torch.from_numpy(tokens.astype(np.int64))).last_hidden_state.numpy()
    assert found.dtype == np.float32 and found.shape == (5, 40, 64)
    assert np.abs(found - wanted).max() < 1e-5 < np.abs(wanted).mean()


def test_one_block_at_a_time_has_weights(make_model, tmp_path, tokens):
    from contextlib import contextmanager

    from quantline.model.block_runner import run_blocks

    seen = []

    @contextmanager
    def watch(prefix, block):
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for other in seen for parameter in other.parameters())
        seen.append(block)
        yield

    run_blocks(Checkpoint(make_model(tmp_path / "model", **SIZES)), tokens, "test", watch)
    assert len(seen) == 3 and all(parameter.is_meta for block in seen for parameter in block.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "llama with biases", "gemma2", "gemma3", "phi3", "gpt-neox",
                                  "gpt2"])
def test_moments_are_those_of_the_inputs_of_the_whole_model(kind, make_model, tmp_path, tokens, monkeypatch):
    import torch
    from transformers.pytorch_utils import Conv1D

    from quantline.model import block_runner as blocks

    folder = make_model(tmp_path / "model", **SIZES, **KINDS[kind])
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 80)
    layers = collect(Checkpoint(folder), tokens, tmp_path)
    found = stored(tmp_path)

    model, inputs = whole(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens.astype(np.int64)))
    assert sorted(layers) == sorted(inputs) == sorted(architecture(Checkpoint(folder)).linears())
    for name, tensor in inputs.items():
        rows = tensor.reshape(-1, tensor.shape[-1]).double().numpy()
        assert layers[name]["tokens"] == len(rows) == tokens.size
        key = layers[name]["moments"]
        wanted = rows.T @ rows / len(rows)
        size = np.sqrt(np.diagonal(wanted))
        off = (unpack(found[f"{key}.diagonal"], found[f"{key}.triangle"]) - wanted) / np.outer(size, size)
        assert np.abs(off).max() < 2**-10 and np.abs(np.diagonal(off)).max() < 1e-4
        np.testing.assert_allclose(found[f"{key}.peak"], np.abs(rows).max(0), rtol=1e-4, atol=1e-6)
        sample = found[f"{key}.sample"]  # rows of the inputs, in their order
        peak = np.abs(rows).max(0)
        assert sample.dtype == np.float16 and np.allclose(sample * peak, rows[::max(1, len(rows) // 128)], rtol=1e-3, atol=1e-5)


def test_layers_that_read_one_tensor_share_one_moment(tiny_model, tmp_path, tokens):
    layers = collect(Checkpoint(tiny_model), tokens, tmp_path)
    shared = {}
    for name, about in layers.items():
        shared.setdefault(about["moments"], []).append(name.split(".")[-1])
    assert sorted(sorted(group) for group in shared.values()) == sorted(2 * [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]])
    assert set(stored(tmp_path)) == {
        f"{key}.{part}" for key in shared for part in ("diagonal", "triangle", "peak", "sample")}


def test_equal_inputs_that_are_not_one_tensor_stay_apart():
    """What is shared is the tensor, not its values: two layers that happen to see the same numbers keep their own."""
    import torch

    kept = {}
    inputs = InputMoments(15, lambda name, moment, **more: kept.update({name: (moment, more)}))
    block = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    with torch.no_grad():
        block[0].weight.copy_(torch.eye(3))
        block[0].bias.zero_()
        with inputs.watch("b", block):
            block(torch.ones(2, 5, 3))
            block(torch.ones(1, 5, 3))
    assert sorted(kept) == ["b.0", "b.1"]
    assert {name: about["tokens"] for name, about in inputs.layers.items()} == {"b.0": 15, "b.1": 15}
    np.testing.assert_array_equal(kept["b.0"][0], np.ones((3, 3)))


def test_sums_keep_small_inputs_beside_large_ones():
    import torch

    kept = {}
    inputs = InputMoments(15, lambda name, moment, **more: kept.update({name: (moment, more)}))
    block = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with torch.no_grad(), inputs.watch("b", block):
        block(torch.full((1, 1, 1), 2.0**13))  # squared 2^26: a float32 sum would swallow every 1 after it
        for _ in range(64):
            block(torch.ones(1, 1, 1))
    assert kept["b.0"][0].item() == np.float32((2.0**26 + 64) / 65)
    assert kept["b.0"][1]["peak"].item() == 2**13


def test_what_lies_below_the_diagonal_of_a_wide_moment_is_what_lies_above():
    import torch

    kept, wide = {}, torch.nn.Linear(600, 3)
    inputs = torch.randn(2, 40, 600, generator=torch.Generator().manual_seed(1)) + 0.5
    moments = InputMoments(160, lambda key, moment, **_: kept.update({key: moment}))
    with moments.watch("block", torch.nn.ModuleDict({"wide": wide})):
        for batch in (inputs, 2 * inputs):
            wide(batch)
    rows = torch.cat([inputs, 2 * inputs]).reshape(-1, 600).double()
    np.testing.assert_allclose(kept["block.wide"], (rows.T @ rows / len(rows)).numpy(), atol=1e-5)
    np.testing.assert_array_equal(kept["block.wide"], kept["block.wide"].T)


@pytest.mark.parametrize(("value", "failure"), [(np.nan, Failure.NON_FINITE), (np.inf, Failure.NON_FINITE),
                                                (0.0, Failure.CALIBRATION_EMPTY)])
def test_moments_that_are_of_no_use_are_refused(value, failure):
    with pytest.raises(StageError) as error:
        check("layer", np.full((2, 2), value, np.float32))
    assert error.value.failure == failure


def test_no_code_of_the_checkpoint_is_run(tiny_model, tmp_path, tokens):
    import shutil

    from quantline.model.block_runner import run_blocks

    folder, flag = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(tiny_model, folder)
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    run_blocks(Checkpoint(folder), tokens, "test")
    assert not flag.exists()
