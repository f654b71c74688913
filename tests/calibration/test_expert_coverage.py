"""What is said of the experts of a mixture, whatever its layers are called."""

import pytest

from quantline.calibration.expert_coverage import coverage_figures, expert_coverage
from quantline.errors import Failure, StageError
from quantline.ingest.verify import check_blocks
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.experts import RoutedExperts
from quantline.model.structure import write_structure
from tests.helpers.calibrated import calibrate_into
from tests.helpers.quantized import tokens_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def jetmoe(make_model, tmp_path_factory) -> Architecture:
    """Experts that are one layer each: two modules in a feed-forward layer, two in an attention."""
    folder = tmp_path_factory.mktemp("jetmoe") / "model"
    return Checkpoint(make_model(folder, "jetmoe", kv_channels=16, **SIZES)).arch


@pytest.fixture(scope="module")
def gpt_oss(make_model, tmp_path_factory) -> Checkpoint:
    """Experts fused into one tensor, transposed and interleaved."""
    folder = make_model(tmp_path_factory.mktemp("oss") / "model", "gpt_oss", **SIZES)
    write_structure(folder, check_blocks(Checkpoint(folder)))
    return Checkpoint(folder)


def test_expert_coverage_is_by_module_whatever_experts_are_called(jetmoe):
    names = jetmoe.linears()
    assert "model.layers.0.mlp.input_linear.3" in names
    layers = {name: {"tokens": 10 + int(name[-1])} for name in names if name[-1].isdigit()}
    starved = next(name for name in layers if name.startswith("model.layers.1.mlp"))
    layers[starved] = {"tokens": 1, "starved": True}
    modules = expert_coverage(jetmoe, layers | {"model.layers.0.other": {"tokens": 40}})
    assert [module["block"] for module in modules] == sorted(module["block"] for module in modules)
    assert {module["block"] for module in modules} == {0, 1}
    found = {module["module"]: module for module in modules}
    assert len(found) == len(modules) == len(layers) / 4
    module, _, number = starved.rpartition(".")
    whole = [1 if str(count) == number else 10 + count for count in range(4)]
    assert found[module]["tokens"] == whole
    assert found[module]["starved"] == [int(number)]
    assert coverage_figures(modules) == {
        "experts": len(layers),
        "experts_starved": 1,
        "expert_tokens_min": 1,
    }


def test_a_dense_model_has_no_experts_to_cover(tiny_model):
    arch = Checkpoint(tiny_model).arch
    modules = expert_coverage(arch, {name: {"tokens": 8} for name in arch.linears()})
    assert modules == []
    assert coverage_figures(modules) is None


def _blind(self, hidden, chosen, weights):
    """Compute as the experts do, while the hooks of their layers see nothing."""
    self.undercalibrated = frozenset(range(len(self)))
    self._as_if_chosen = lambda expert, hidden, weights: 0
    return _forward(self, hidden, chosen, weights)


def _half_blind(self, hidden, chosen, weights):
    """Count tokens that the hooks of the layers do not see."""
    out = _forward(self, hidden, chosen, weights)
    self.tokens_seen = [seen + 1 for seen in self.tokens_seen]
    return out


_forward = RoutedExperts.forward


@pytest.mark.parametrize("planted", [_blind, _half_blind])
def test_fused_experts_that_were_not_calibrated_are_caught(planted, gpt_oss, tmp_path, monkeypatch):
    monkeypatch.setattr(RoutedExperts, "forward", planted)
    with pytest.raises(StageError, match=r"expected model\.layers\.0\.mlp\.experts\.") as caught:
        calibrate_into(tmp_path / "calibration", gpt_oss, tokens_of(gpt_oss, 4, 32), seed=None)
    assert caught.value.failure == Failure.CALIBRATION_EMPTY


def test_experts_that_the_hooks_see_are_calibrated(gpt_oss, tmp_path):
    store = calibrate_into(tmp_path / "calibration", gpt_oss, tokens_of(gpt_oss, 4, 32), seed=None)
    modules = expert_coverage(gpt_oss.arch, store.info["layers"])
    assert [module["module"] for module in modules] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    assert all(sum(module["tokens"]) == 4 * 32 * 2 for module in modules)
