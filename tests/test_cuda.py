"""The same code on a GPU: calibration and every recipe agree with the CPU, and repeat themselves to the byte.

    CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py     # the tests see no GPU unless they are shown one
"""

import numpy as np
import pytest
import torch

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.model.device import device
from quantline.calibration.collect import ABOUT, Moments, collect
from quantline.model.checkpoint import Checkpoint
from quantline.config.recipes import RECIPES
from quantline.recipes.dispatch import round_block
from quantline.recipes.context import Work
from quantline.runtimes.runtime import open_runtime
from quantline.files import write_json

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="expected a GPU: CUDA_VISIBLE_DEVICES=0")
GRID = {"bits": 3, "group_size": 32, "symmetric": False}
ASKED = {"rtn": {"method": "rtn", **GRID}, "gptq": {"method": "gptq", **GRID}, "symmetric": {"method": "gptq", **GRID | {"symmetric": True}},
         "min-max": {"method": "gptq", **GRID, "scales": "minmax", "act_order": False},
         "curvature": {"method": "gptq", **GRID, "curvature": True}, "awq": {"method": "awq", **GRID},
         "awq-gptq": {"method": "awq", **GRID, "rounding": "gptq"}, "smoothquant": {"method": "smoothquant"},
         "awq-gptq-curvature": {"method": "awq", **GRID, "rounding": "gptq", "curvature": True},
         "int8": {"method": "int8"}, "fp8": {"method": "fp8"}}


@pytest.fixture
def on(monkeypatch):
    """on("cpu") or on("cuda"): where what follows is computed."""
    def choose(kind: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        device.cache_clear()
        assert device().type == kind

    yield choose
    monkeypatch.undo()
    device.cache_clear()


def calibrated(model, folder):
    tokens = np.random.default_rng(0).integers(0, 300, (8, 64)).astype(np.int32)
    folder.mkdir()
    write_json(folder / ABOUT, {"layers": collect(Checkpoint(model), tokens, folder, 0), "curvature": True, "tokens": tokens.size})
    return Moments(folder)


def rounded(model, moments, recipe, folder):
    folder.mkdir()
    checkpoint = Checkpoint(model)
    work, layers = Work(RECIPES[recipe["method"]](**recipe), checkpoint, architecture(checkpoint), moments, QuantizedWriter(folder)), {}
    for layer in range(work.facts.layers):
        done = round_block(work, layer)
        work.writer.close_part(f"block-{layer:03d}", done)
        layers |= done["layers"]
    work.writer.close({"layers": layers})
    return Quantized(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_statistics_are_the_cpus_and_repeat_to_the_byte(on, tmp_path, tiny_model):
    on("cpu")
    wanted = calibrated(tiny_model, tmp_path / "cpu")
    on("cuda")
    found, again = calibrated(tiny_model, tmp_path / "cuda"), calibrated(tiny_model, tmp_path / "again")
    assert files(found.folder) == files(again.folder)
    assert found.layers == wanted.layers
    for name in wanted.layers:
        for what, share in (("moment", 1e-3), ("peak", 1e-4), ("factors", 0.02)):  # a drawn label may differ here and there
            one, other = getattr(wanted, what)(name), getattr(found, what)(name)
            assert np.linalg.norm(other - one) <= share * np.linalg.norm(one), (name, what)


@pytest.mark.parametrize("name", ASKED)
def test_a_recipe_rounds_as_on_the_cpu_and_repeats_to_the_byte(on, name, tmp_path, tiny_model):
    on("cpu")
    moments = calibrated(tiny_model, tmp_path / "calibration")
    wanted = rounded(tiny_model, moments, ASKED[name], tmp_path / "cpu")
    on("cuda")
    found, again = (rounded(tiny_model, moments, ASKED[name], tmp_path / one) for one in ("cuda", "again"))
    assert files(found.folder) == files(again.folder)
    alike, errors = [], []
    for layer in wanted.linears:
        ours, theirs = (next(iter(one.linear(layer).parts().values())) for one in (found, wanted))
        alike.append((ours == theirs).mean())
        errors.append(found.report["layers"][layer]["error"] / wanted.report["layers"][layer]["error"])
    assert np.mean(alike) > (0.8 if name not in ("rtn", "int8", "fp8") else 0.999)
    assert np.mean(errors) == pytest.approx(1, abs=0.02)


def test_transformers_computes_there_and_agrees(tiny_model, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 300, (2, 40)).astype(np.int32)
    there = open_runtime("transformers", tiny_model, 1)
    assert there.device == "cuda"
    ours, generated = there.logprobs(tokens), there.generate(tokens[0].tolist(), 8, set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = open_runtime("transformers", tiny_model, 1)
    assert here.device == "cpu" and np.allclose(ours, here.logprobs(tokens), atol=1e-4)
    assert generated == here.generate(tokens[0].tolist(), 8, set())
