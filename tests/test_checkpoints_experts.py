"""Experts as layers of their own compute what transformers' fused ones do, and each is calibrated on its own tokens."""

import json

import numpy as np
import pytest
import torch
from rounded import tokens_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantline.model import block_runner as blocks, experts
from quantline.model.architecture import architecture
from quantline.quantized.store import QuantizedWriter
from quantline.model.experts import Experts
from quantline.calibration.collect import ABOUT, Moments, check_seen, collect
from quantline.model.checkpoint import Checkpoint
from quantline.config.recipes import RECIPES
from quantline.recipes.dispatch import round_block
from quantline.recipes.context import Work
from quantline.errors import Failure, StageError
from quantline.files import write_json

KINDS = {"mixtral": {"num_local_experts": 4, "tie_word_embeddings": False},
         "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]}}
COUNT, WIDTH, INNER, USED = 5, 16, 24, 2


@pytest.fixture(params=KINDS)
def checkpoint(request, make_model, tmp_path):
    return Checkpoint(make_model(tmp_path / "model", request.param, hidden_size=64, intermediate_size=96, **KINDS[request.param]))


def calibrated(checkpoint, folder, tokens) -> Moments:
    folder.mkdir()
    layers = collect(checkpoint, tokens, folder, seed=0)
    write_json(folder / ABOUT, {"layers": layers, "curvature": True, "text_sha256": "", "tokens": tokens.size, "seed": 0})
    return Moments(folder)


class Plain(torch.nn.Module):
    """Experts in the plainest way, on fused parameters, that keep what each of them read."""

    def __init__(self, gate_up, down, everywhere=False):
        super().__init__()
        self.gate_up, self.down, self.everywhere, self.kept = gate_up, down, everywhere, {}

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for number in range(len(self.down)):
            share = ((chosen == number) * weights).sum(1)
            place = torch.nonzero(share)[:, 0]
            if self.everywhere:
                place, share = torch.arange(len(hidden)), share.detach()
            rows = hidden[place]
            gate, up = (rows @ half.T for half in self.gate_up[number].chunk(2))
            inner = torch.nn.functional.silu(gate) * up
            made = inner @ self.down[number].T
            self.kept[number] = rows, inner
            out = out.index_add(0, place, made * share[place, None])
        return out


def fused(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(COUNT, 2 * INNER, WIDTH, generator=draw) / 4, torch.randn(COUNT, WIDTH, INNER, generator=draw) / 4,
            torch.randn(40, WIDTH, generator=draw), torch.stack([torch.randperm(COUNT, generator=draw)[:USED] for _ in range(40)]),
            torch.rand(40, USED, generator=draw))


def apart(gate_up, down) -> Experts:
    made = Experts(COUNT, WIDTH, INNER, ["g", "u", "d"], torch.nn.SiLU())
    with torch.no_grad():
        for number, expert in enumerate(made):
            for name, value in zip("gud", (*gate_up[number].chunk(2), down[number]), strict=True):
                getattr(expert, name).weight.copy_(value)
    return made


@pytest.mark.parametrize("starved", [(), (1, 3), tuple(range(COUNT))])
def test_values_and_gradients_are_those_of_transformers(starved):
    """Also where starved experts show all tokens to who listens."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    gate_up, down, hidden, chosen, weights = fused()
    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=COUNT, experts_implementation="eager")
    theirs, ours = MixtralExperts(config), apart(gate_up, down)
    ours.starved = frozenset(starved)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(gate_up)
        theirs.down_proj.copy_(down)
    found = []
    for module in (theirs, ours):
        states, shares = hidden.clone().requires_grad_(True), weights.clone().requires_grad_(True)
        out = module(states, chosen, shares)
        out.square().sum().backward()
        found.append((out, states.grad, shares.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_starved_expert_gets_the_gradients_of_all_tokens():
    gate_up, down, hidden, chosen, weights = fused()
    ours, alone = apart(gate_up, down), apart(gate_up, down)[2]
    ours.starved = frozenset([2])
    seen, wanted = heard(ours[2]), heard(alone)
    slope = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(9))
    (ours(hidden.clone().requires_grad_(True), chosen, weights) * slope).sum().backward()
    (alone(hidden) * slope * weights.mean(1, keepdim=True)).sum().backward()
    assert sorted(seen) == sorted(wanted) == ["d", "g", "u"]
    for name, gradient in wanted.items():
        assert len(seen[name]) == 40 and torch.allclose(seen[name], gradient, atol=1e-5)


def heard(expert) -> dict[str, torch.Tensor]:
    """What will be the gradients at the outputs of an expert's layers, as a hook hears of them."""
    found = {}

    def listen(name):
        def on_output(module, args, out):
            out.register_hook(lambda gradient: found.__setitem__(name, gradient))
        return on_output

    for name in "gud":
        getattr(expert, name).register_forward_hook(listen(name))
    return found


def second_moment(rows):
    rows = rows.detach().double().numpy()
    return rows.T @ rows / len(rows)


def close(found, wanted):
    size = np.sqrt(np.outer(np.diagonal(wanted), np.diagonal(wanted))) + 1e-30
    return np.abs((found - wanted) / size).max() < 2**-9


@pytest.mark.parametrize("everywhere", [False, True], ids=["enough tokens", "starved"])
def test_moments_are_those_of_each_experts_tokens(checkpoint, everywhere, tmp_path, monkeypatch):
    """Those that came to it, or if those are too few all of them."""
    monkeypatch.setattr(experts, "NEEDED", 1e-9 if everywhere else 1e9)
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 80)
    facts, tokens = architecture(checkpoint), tokens_of(checkpoint, 5, 40)
    found = calibrated(checkpoint, tmp_path / "c", tokens)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    counted, plain = 0, {}
    for layer in sorted(facts.sparse_layers):
        module = model.model.layers[layer].mlp.experts
        weights = module.gate_up_proj.detach(), module.down_proj.detach()
        plain[layer] = Plain(*weights, everywhere), Plain(*weights)
        module.forward = lambda *args, pair=plain[layer]: (pair[0](*args), pair[1](*args))[1]
    model(input_ids=torch.from_numpy(tokens).long())
    for layer in sorted(facts.sparse_layers):
        kept, honest = plain[layer]
        for number in range(facts.experts):
            rows, inner, *_ = kept.kept[number]
            names = [name for name in facts.linears_of(layer) if f".experts.{number}." in name]
            gate, up, down = (next(name for name in names if facts.role(name) == role)
                              for role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"))
            for name, wanted in ((gate, rows), (up, rows), (down, inner)):
                assert close(found.moment(name), second_moment(wanted))
                seen = {"tokens": len(honest.kept[number][0])} | ({"starved": True} if everywhere else {})
                assert found.seen(name) == seen
            counted += len(honest.kept[number][0])
            assert found.info["layers"][gate]["moments"] == found.info["layers"][up]["moments"]
    assert counted == tokens.size * facts.experts_used * len(facts.sparse_layers)
    assert all(np.isfinite(found.factors(name)).all() for name in facts.linears())


@pytest.fixture
def lonely(make_model, tmp_path):
    """Mixtral with one expert a token, of which the last is never chosen: its row of the router is the mean of the others."""
    folder = make_model(tmp_path / "lonely", "mixtral", hidden_size=64, intermediate_size=96, num_local_experts=4,
                        num_experts_per_tok=1, tie_word_embeddings=False, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensor[3] = tensor[:3].mean(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def test_an_expert_that_no_token_comes_to_is_calibrated_and_reported(lonely, tmp_path):
    tokens, facts = tokens_of(lonely, 16, 40), architecture(lonely)
    moments = calibrated(lonely, tmp_path / "c", tokens)
    starving = [name for name in facts.linears() if moments.seen(name).get("starved")]
    assert {name for name in facts.linears() if ".experts.3." in name} <= set(starving)
    assert all(moments.seen(name) == {"tokens": 0, "starved": True} for name in starving if ".experts.3." in name)
    assert all(moments.tokens(name) < 24 for name in starving)
    assert all(moments.tokens(name) >= 24 for name in facts.linears() if name not in starving)
    for method in ("gptq", "awq"):
        (tmp_path / method).mkdir()
        recipe = RECIPES[method](method=method, bits=4, group_size=32, symmetric=True, curvature=True)
        done = round_block(Work(recipe, lonely, facts, moments, QuantizedWriter(tmp_path / method)), 1)
        assert len(done["layers"]) == 16
        for name, about in done["layers"].items():
            assert about.get("starved", False) == (name in starving) and about["tokens"] == moments.tokens(name)
            assert 0 < about["divergence"] <= about["rtn_divergence"]


def test_a_killed_calibration_goes_on_with_the_same_experts_starved(lonely, tmp_path):
    """The backward pass of a new process learns from the first pass of the old one which experts see all tokens."""
    tokens = tokens_of(lonely, 16, 40)
    whole = calibrated(lonely, tmp_path / "c", tokens)
    folder = tmp_path / "again"
    folder.mkdir()

    class Killed(BaseException):
        pass

    def stop(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantline.calibration.output_moments.first_gradients", stop)
        with pytest.raises(Killed):
            collect(lonely, tokens, folder, seed=0)
    layers = collect(lonely, tokens, folder, seed=0)
    assert layers == whole.info["layers"]
    for path in sorted(folder.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


def test_experts_that_together_missed_a_token_are_refused(lonely):
    facts = architecture(lonely)
    layers = {name: {"tokens": 10} for name in facts.linears()} | {
        name: {"tokens": tokens} for number, tokens in enumerate((4, 5, 0, 1)) for name in facts.linears()
        if f".experts.{number}." in name}
    check_seen(facts, layers, 10)
    layers["model.layers.1.block_sparse_moe.experts.1.w2"] = {"tokens": 4}
    with pytest.raises(StageError, match=r"layers.1.block_sparse_moe.experts.\*.w2 to see 10 tokens, found 9") as caught:
        check_seen(facts, layers, 10)
    assert caught.value.failure == Failure.CALIBRATION_EMPTY


def test_the_closing_line_counts_starved_experts(project, lonely, capsys):
    project.compose(f"model.path={lonely.folder}")
    project.stage("load")
    project.stage("calibrate")
    told = capsys.readouterr().out
    layers = json.loads((project.root / "artifacts/calibration/calibration.json").read_text())["layers"]
    starved = sum(name.endswith(".w1") and about.get("starved", False) for name, about in layers.items())
    assert starved >= 2 and f"{starved} of 8 experts starved (calibrated on all tokens)" in told
