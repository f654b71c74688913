"""On a GPU calibration and every recipe agree with the CPU, and repeat themselves to the byte.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py     # tests see no GPU otherwise
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.structure import write_structure
from quantline.quantized.store import QuantizedModel
from quantline.recipes.quantize import quantize_model
from quantline.runtimes.runtime import open_runtime
from tests.helpers.calibrated import calibrate_into

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="expected a GPU: CUDA_VISIBLE_DEVICES=0"
)
GRID = {"bits": 3, "group_size": 32, "symmetric": False}
GPTQ = {"method": "gptq", **GRID}
AWQ = {"method": "awq", **GRID}
RECIPES = {
    "rtn": {"method": "rtn", **GRID},
    "gptq": GPTQ,
    "symmetric": GPTQ | {"symmetric": True},
    "min-max": GPTQ | {"scales": "minmax", "act_order": False},
    "curvature": GPTQ | {"curvature": True},
    "awq": AWQ,
    "awq-gptq": AWQ | {"rounding": "gptq"},
    "smoothquant": {"method": "smoothquant"},
    "awq-gptq-curvature": AWQ | {"rounding": "gptq", "curvature": True},
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
}
NO_CHOICE = ("rtn", "int8", "fp8")  # recipes in which rounding has no choice to make
# Models whose structure is found: routed experts, latent attention, states of convolutions.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
FOUND = {
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **SIZES,
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"qk_rope_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "num_key_value_heads": 4,
    },
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}
# What a calibration holds of a layer → the share by which the devices may differ: labels that are
# drawn may be others.
STATISTICS = {"hessian": 0.02, "input_peak": 1e-4, "fisher_out": 0.02}


@pytest.fixture
def use_device(monkeypatch):
    """use_device("cpu") or use_device("cuda"): where what follows is computed."""

    def choose(kind: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        device.cache_clear()
        assert device().type == kind

    yield choose
    monkeypatch.undo()
    device.cache_clear()


def random_tokens(sequences: int, length: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 300, (sequences, length)).astype(np.int32)


def calibrate(model: Path, folder: Path) -> CalibrationStore:
    return calibrate_into(folder, Checkpoint(model), random_tokens(8, 64), weighted=True)


def quantize(
    model: Path, calibration: CalibrationStore, recipe: dict, folder: Path
) -> QuantizedModel:
    folder.mkdir()
    quantize_model("recipe", parse_recipe(recipe), Checkpoint(model), calibration, folder)
    return QuantizedModel(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_calibration_on_a_gpu_is_the_cpus_and_repeats_itself_to_the_byte(
    use_device, tmp_path, tiny_model
):
    use_device("cpu")
    expected = calibrate(tiny_model, tmp_path / "cpu")
    use_device("cuda")
    first = calibrate(tiny_model, tmp_path / "first")
    second = calibrate(tiny_model, tmp_path / "second")
    assert files(first.folder) == files(second.folder)
    assert first.layers == expected.layers
    for layer in expected.layers:
        for statistic, share in STATISTICS.items():
            on_cpu = getattr(expected, statistic)(layer)
            difference = getattr(first, statistic)(layer) - on_cpu
            limit = share * np.linalg.norm(on_cpu)
            assert np.linalg.norm(difference) <= limit, (layer, statistic)


@pytest.mark.parametrize("name", RECIPES)
def test_quantize_model_on_a_gpu_is_the_cpus_and_repeats_itself_to_the_byte(
    use_device, name, tmp_path, tiny_model
):
    use_device("cpu")
    calibration = calibrate(tiny_model, tmp_path / "calibration")
    expected = quantize(tiny_model, calibration, RECIPES[name], tmp_path / "cpu")
    use_device("cuda")
    first = quantize(tiny_model, calibration, RECIPES[name], tmp_path / "first")
    second = quantize(tiny_model, calibration, RECIPES[name], tmp_path / "second")
    assert files(first.folder) == files(second.folder)
    equal = []
    errors = []
    for layer in expected.linears:
        weights = [next(iter(model.linear(layer).parts().values())) for model in (first, expected)]
        equal.append((weights[0] == weights[1]).mean())
        error = first.report["layers"][layer]["error"]
        errors.append(error / expected.report["layers"][layer]["error"])
    assert np.mean(equal) > (0.999 if name in NO_CHOICE else 0.8)
    assert np.mean(errors) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", FOUND)
def test_a_found_structure_on_a_gpu_is_the_cpus_and_rounds_to_the_same_bytes(
    use_device, kind, tmp_path, make_model
):
    model = make_model(tmp_path / "model", kind, **FOUND[kind])
    use_device("cpu")
    expected = verify.check_blocks(Checkpoint(model))
    write_structure(model, expected)
    on_cpu = calibrate(model, tmp_path / "cpu")
    use_device("cuda")
    assert verify.check_blocks(Checkpoint(model)) == expected
    calibrations = [calibrate(model, tmp_path / name) for name in ("first", "second")]
    assert files(calibrations[0].folder) == files(calibrations[1].folder)
    assert calibrations[0].layers == on_cpu.layers
    for layer in on_cpu.layers:
        hessian = on_cpu.hessian(layer)
        difference = calibrations[0].hessian(layer) - hessian
        assert np.linalg.norm(difference) <= 1e-3 * np.linalg.norm(hessian), layer
    rounded = [quantize(model, calibrations[0], GPTQ, tmp_path / name) for name in ("1", "2")]
    assert files(rounded[0].folder) == files(rounded[1].folder)


def test_transformers_on_a_gpu_agrees_with_the_cpu(tiny_model, monkeypatch):
    tokens = random_tokens(2, 40)
    prompt = tokens[0].tolist()
    on_gpu = open_runtime("transformers", tiny_model, 1)
    assert on_gpu.device == "cuda"
    logprobs = on_gpu.logprobs(tokens)
    answer = on_gpu.generate(prompt, 8, set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = open_runtime("transformers", tiny_model, 1)
    assert on_cpu.device == "cpu"
    assert np.allclose(logprobs, on_cpu.logprobs(tokens), atol=1e-4)
    assert answer == on_cpu.generate(prompt, 8, set())
