"""Each expert is calibrated on its own tokens, or on all of them where too few reach it."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from quantline.calibration.collect import check_coverage, collect_statistics
from quantline.config.recipes import RECIPES
from quantline.errors import Failure, StageError
from quantline.model import block_runner, experts
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedWriter
from quantline.recipes.context import QuantizationContext
from quantline.recipes.quantize_block import quantize_block
from tests.helpers.calibrated import calibrate_into
from tests.helpers.lonely import write_lonely_mixture
from tests.helpers.models import transformers_model
from tests.helpers.quantized import tokens_of

KINDS = {
    "mixtral": {"num_local_experts": 4, "tie_word_embeddings": False},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
}


@pytest.fixture(params=KINDS)
def checkpoint(request, make_model, tmp_path) -> Checkpoint:
    sizes = {"hidden_size": 64, "intermediate_size": 96} | KINDS[request.param]
    return Checkpoint(make_model(tmp_path / "model", request.param, **sizes))


class PlainExperts(nn.Module):
    """Experts in the plainest way, on fused parameters; `inputs` is what each of them read.

    With `everywhere` each expert reads all tokens, with the mean weight where none was given.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, everywhere: bool = False):
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.everywhere = everywhere
        self.inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for number in range(len(self.down)):
            weight = ((chosen == number) * weights).sum(1)
            tokens = torch.nonzero(weight)[:, 0]
            if self.everywhere:
                tokens = torch.arange(len(hidden))
                weight = weight.detach()
            rows = hidden[tokens]
            gate, up = (rows @ half.T for half in self.gate_up[number].chunk(2))
            inner = nn.functional.silu(gate) * up
            self.inputs[number] = (rows, inner)
            out = out.index_add(0, tokens, inner @ self.down[number].T * weight[tokens, None])
        return out


def second_moments(rows: torch.Tensor) -> np.ndarray:
    values = rows.detach().double().numpy()
    return values.T @ values / len(values)


def is_close(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether second moments agree, measured by the sizes of their channels."""
    diagonal = np.diagonal(expected)
    size = np.sqrt(np.outer(diagonal, diagonal)) + 1e-30
    return np.abs((actual - expected) / size).max() < 2**-9


def replace_experts(model, layer: int, everywhere: bool) -> tuple[PlainExperts, PlainExperts]:
    """Have plain experts stand in for those of a block of transformers' model.

    Returns:
        Experts that read as calibrated ones do, and experts that read what comes to them; the
        block goes on with the values of the latter.
    """
    module = model.model.layers[layer].mlp.experts
    parameters = (module.gate_up_proj.detach(), module.down_proj.detach())
    calibrated = PlainExperts(*parameters, everywhere)
    chosen = PlainExperts(*parameters)

    def forward(*args):
        calibrated(*args)
        return chosen(*args)

    module.forward = forward
    return calibrated, chosen


@pytest.mark.parametrize("everywhere", [False, True], ids=["enough tokens", "undercalibrated"])
def test_collect_statistics_takes_each_expert_on_its_own_tokens(
    checkpoint, everywhere, tmp_path, monkeypatch
):
    """Those that came to it, or if those are too few all of them."""
    monkeypatch.setattr(experts, "NEEDED_SHARE", 1e-9 if everywhere else 1e9)
    monkeypatch.setattr(block_runner, "BATCH_TOKENS", 80)
    arch = checkpoint.arch
    tokens = tokens_of(checkpoint, 5, 40)
    store = calibrate_into(tmp_path / "calibration", checkpoint, tokens)
    model = transformers_model(checkpoint.folder)
    layers = sorted(arch.sparse_layers)
    assert layers
    plain = {layer: replace_experts(model, layer, everywhere) for layer in layers}
    model(input_ids=torch.from_numpy(tokens).long())
    counted = 0
    for layer in layers:
        calibrated, chosen = plain[layer]
        for number in range(arch.experts):
            rows, inner = calibrated.inputs[number]
            reached = len(chosen.inputs[number][0])
            counted += reached
            by_part = {
                arch.part(name): name
                for name in arch.linears_of(layer)
                if f".experts.{number}." in name
            }
            inputs = {"ffn_gate_exps": rows, "ffn_up_exps": rows, "ffn_down_exps": inner}
            for part, expected in inputs.items():
                name = by_part[part]
                assert is_close(store.hessian(name), second_moments(expected))
                marked = {"starved": True} if everywhere else {}
                assert store.coverage(name) == {"tokens": reached} | marked
            gate = by_part["ffn_gate_exps"]
            assert store.input_key(gate) == store.input_key(by_part["ffn_up_exps"])
    assert counted == tokens.size * arch.experts_used * len(layers)
    for name in arch.linears():
        assert np.isfinite(store.fisher_out(name)).all()


@pytest.fixture
def lonely(tmp_path) -> Checkpoint:
    """A mixture whose router never chooses the last expert."""
    return Checkpoint(write_lonely_mixture(tmp_path / "lonely"))


def test_quantize_block_reports_an_expert_that_no_token_comes_to(lonely, tmp_path):
    tokens = tokens_of(lonely, 16, 40)
    arch = lonely.arch
    store = calibrate_into(tmp_path / "calibration", lonely, tokens, weighted=True)
    undercalibrated = {name for name in arch.linears() if store.coverage(name).get("starved")}
    of_the_last = {name for name in arch.linears() if ".experts.3." in name}
    assert of_the_last
    assert of_the_last <= undercalibrated
    for name in of_the_last:
        assert store.coverage(name) == {"tokens": 0, "starved": True}
    for name in arch.linears():
        assert (store.tokens(name) < 24) == (name in undercalibrated)
    for method in ("gptq", "awq"):
        (tmp_path / method).mkdir()
        options = {"bits": 4, "group_size": 32, "symmetric": True, "curvature": True}
        recipe = RECIPES[method].model_validate(options | {"method": method})
        writer = QuantizedWriter(tmp_path / method)
        report = quantize_block(QuantizationContext(recipe, lonely, arch, store, writer), 1)
        assert len(report["layers"]) == 16
        for name, entry in report["layers"].items():
            assert entry.get("starved", False) == (name in undercalibrated)
            assert entry["tokens"] == store.tokens(name)
            assert 0 < entry["divergence"] <= entry["rtn_divergence"]


def test_collect_statistics_resumes_with_the_same_experts_undercalibrated(lonely, tmp_path):
    """A new process learns from the forward pass of the killed one which experts see all tokens."""
    tokens = tokens_of(lonely, 16, 40)
    complete = calibrate_into(tmp_path / "complete", lonely, tokens, weighted=True)
    folder = tmp_path / "killed"
    folder.mkdir()

    class Killed(BaseException):
        """Ends the run without tidying up."""

    def kill(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantline.calibration.collect.last_block_gradients", kill)
        with pytest.raises(Killed):
            collect_statistics(lonely, tokens, folder, seed=0, weighted=True)
    layers = collect_statistics(lonely, tokens, folder, seed=0, weighted=True)
    assert layers == complete.info["layers"]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 8
    for path in files:
        assert path.read_bytes() == (complete.folder / path.name).read_bytes()


def test_check_coverage_refuses_experts_that_together_missed_a_token(lonely):
    arch = lonely.arch
    layers = {name: {"tokens": 10} for name in arch.linears()}
    for number, tokens in enumerate((4, 5, 0, 1)):
        for name in arch.linears():
            if f".experts.{number}." in name:
                layers[name] = {"tokens": tokens}
    check_coverage(arch, layers, 10)
    layers["model.layers.1.block_sparse_moe.experts.1.w2"] = {"tokens": 4}
    expected = r"layers\.1\.block_sparse_moe\.experts\.\*\.w2 to see 10 tokens, found 9"
    with pytest.raises(StageError, match=expected) as error:
        check_coverage(arch, layers, 10)
    assert error.value.failure == Failure.CALIBRATION_EMPTY


def test_calibrate_counts_undercalibrated_experts_in_its_summary(project, lonely, capsys):
    project.compose(f"model.path={lonely.folder}")
    project.stage("load")
    project.stage("calibrate")
    output = capsys.readouterr().out
    info = json.loads((project.root / "artifacts/calibration/calibration.json").read_text())
    gates = {name: entry for name, entry in info["layers"].items() if name.endswith(".w1")}
    count = sum(entry.get("starved", False) for entry in gates.values())
    assert len(gates) == 8
    assert count >= 2
    assert f"{count} of 8 experts undercalibrated (calibrated on all tokens)" in output
