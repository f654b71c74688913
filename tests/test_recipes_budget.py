"""Fit to a budget: what it costs to round a tensor, what is chosen, that the file is no larger, and how it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from rounded import tokens_of, torch_logprobs, torch_model
from safetensors.numpy import load_file

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized
from quantline.calibration.embedding_and_head import final_states
from quantline.calibration.collect import ABOUT, Moments
from quantline.model.checkpoint import Checkpoint
from quantline.config.compose import load_params
from quantline.config.params import Variant
from quantline.formats.container import load_format
from quantline.formats.gguf import container as gguf
from quantline.methods.integer import rtn
from quantline.recipes.budget import costs as module
from quantline.recipes.budget.costs import Costs
from quantline.recipes.context import Work
from quantline.runtimes.runtime import open_runtime
from quantline.errors import Failure, Reason, StageError

RECIPES = ["q4_k_m", "q4_k_m-budget", "q4_k_m-curvature-budget", "gptq-w4g128", "gptq-w4g128-budget"]
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """artifacts/ with the model and a calibration, made once."""
    return tmp_path_factory.mktemp("calibrated") / "artifacts"


@pytest.fixture
def ready(project, calibrated, tiny_model):
    """The project with everything before quantize done."""
    compose(project)
    if not calibrated.exists():
        shutil.copytree(tiny_model, project.root / "artifacts/model")
        project.stage("calibrate")
        shutil.copytree(project.root / "artifacts", calibrated)
    else:
        shutil.copytree(calibrated, project.root / "artifacts")
    return project


def compose(project, *overrides: str) -> None:
    project.compose(f"recipe=[{','.join(['none', *RECIPES])}]", "variant=[bf16]", *overrides)


def made(project, name: str) -> Quantized:
    project.stage("quantize", name)
    return Quantized(f"artifacts/quantized/{name}")


def budget_of(quantized: Quantized) -> dict:
    return next(one for one in quantized.report["transforms"] if one["step"] == "budget")


def exported(quantized: Quantized, folder, **how):
    folder.mkdir()
    variant = Variant(**{"recipe": quantized.report["recipe"]["name"], "format": "gguf", "runtime": "llama.cpp"} | how)
    load_format(variant.format).write(Checkpoint("artifacts/model"), quantized, folder, variant)
    return folder


def bits_per_weight(quantized: Quantized, folder, kind: str) -> float:
    model = Checkpoint("artifacts/model")
    held = load_format(kind).read_back(folder, model)
    return 8 * sum(held[name].bytes for name in model.names) / sum(np.prod(model.shape(name)) for name in model.names)


def work_of(folder, curvature: bool = True) -> Work:
    moments = Moments(folder / "calibration")
    moments.info["curvature"] = curvature
    model = Checkpoint(folder / "model")
    return Work(None, model, architecture(model), moments, None)


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32) * 0.01


@pytest.mark.parametrize("curvature", [True, False])
def test_the_cost_of_a_layer_is_the_sum_over_weights(ready, curvature):
    work = work_of(ready.root / "artifacts", curvature)
    name = "model.layers.1.mlp.down_proj"
    weight = work.checkpoint.tensor(f"{name}.weight")
    change, moment, factors = noise(weight.shape), work.moments.moment(name).astype(float), None
    found = Costs(work).of(f"{name}.weight", torch.from_numpy(weight))(torch.from_numpy(weight + change))
    if curvature:
        factors = Moments("artifacts/calibration").factors(name)[0].astype(float)
        wanted = 0.5 * np.einsum("ab,bi,ij,aj->", factors, change, moment, change, optimize=True)
    else:
        wanted = np.einsum("ai,ij,aj->", change, moment, change) / np.einsum("ai,ij,aj->", weight, moment, weight)
    assert found == pytest.approx(wanted, rel=1e-4) and found > 0


def test_the_cost_of_a_tied_embedding_is_that_of_both_ends(ready):
    work = work_of(ready.root / "artifacts")
    name = work.facts.embedding
    weight = work.checkpoint.tensor(name)
    change = noise(weight.shape)
    stored = load_file("artifacts/calibration/embedding.safetensors")
    assert stored["diagonal"].shape == (1, 256)
    tokens = load_file("artifacts/calibration/tokens.safetensors")["tokens"].reshape(-1)
    often = (np.bincount(tokens, minlength=len(weight)) + 1) / (len(tokens) + len(weight))
    from quantline.calibration.embedding_and_head import embedding_factors

    factors = embedding_factors(ready.root / "artifacts/calibration")[0].astype(float)
    below = 0.5 * sum(often[token] * change[token] @ factors @ change[token] for token in range(len(weight)))
    states = final_states(ready.root / "artifacts/calibration").astype(float)
    assert states.shape == (512, 256)
    before, after = (np.exp(logits - logits.max(1, keepdims=True)) for logits in (states @ weight.T, states @ (weight + change).T))
    before, after = (one / one.sum(1, keepdims=True) for one in (before, after))
    above = (before * np.log(before / after)).sum(1).mean()
    found = Costs(work).of(name, torch.from_numpy(weight))(torch.from_numpy(weight + change))
    assert found == pytest.approx(below + above, rel=1e-3) and min(below, above) > 0


def test_a_head_in_chunks_costs_the_same(ready, monkeypatch):
    work, name = work_of(ready.root / "artifacts"), "model.embed_tokens.weight"
    weight = torch.from_numpy(work.checkpoint.tensor(name))
    whole = Costs(work).of(name, weight)(weight * 1.01)
    monkeypatch.setattr(module, "CHUNK_VALUES", 5000)
    assert Costs(work).of(name, weight)(weight * 1.01) == pytest.approx(whole, rel=1e-4)


def test_costs_are_what_the_model_really_loses(ready, tiny_model):
    """The prediction for one rounded layer after another, against the divergence of the rounded model on the same text."""
    work, found, wanted = work_of(ready.root / "artifacts"), [], []
    tokens = load_file("artifacts/calibration/tokens.safetensors")["tokens"]
    plain = torch_logprobs(torch_model(work.checkpoint, Quantized_of({})), tokens)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        weight = torch.from_numpy(work.checkpoint.tensor(f"{name}.weight"))
        linear = rtn.quantize(weight, 4, 128, False)
        found.append(Costs(work).of(f"{name}.weight", weight)(torch.from_numpy(linear.dequantize())))
        ours = torch_logprobs(torch_model(work.checkpoint, Quantized_of({name: linear})), tokens)
        wanted.append(float((np.exp(plain) * (plain - ours)).sum(-1).mean()))
    assert np.array(found) == pytest.approx(np.array(wanted), rel=0.5)


def Quantized_of(linears: dict):
    """Something that reads like quantized weights."""
    return type("Some", (), {"linears": list(linears), "overrides": {}, "linear": staticmethod(linears.__getitem__)})


@pytest.mark.parametrize("name", ["q4_k_m-budget", "q4_k_m-curvature-budget"])
def test_types_that_fit_the_size_of_the_mix_and_cost_less(ready, tmp_path, name):
    quantized, told = made(ready, name), None
    told = budget_of(quantized)
    kinds = {place: one["what"] for place, one in told["chosen"].items()}
    assert len(kinds) == 15 and set(kinds.values()) <= set(TYPES) and len(set(kinds.values())) > 1
    assert told["unit"].startswith("nats") and told["rounding"].startswith("ggml") and 0 < told["predicted"] < told["predicted_without"]
    assert told["bytes"] == sum(one["bytes"] for one in told["chosen"].values()) <= told["limit_bytes"]
    assert told["predicted"] == pytest.approx(sum(one["cost"] for one in told["chosen"].values())) and told["price_per_mib"] > 0
    tensors = quantized.report["tensors"]
    places = {"model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight", "model.embed_tokens.weight": "token_embd.weight"}
    for tensor, place in places.items():
        assert tensors[tensor]["actual"] == tensors[tensor]["requested"] == kinds[place] == quantized.blocks(tensor)[0]
    uniform = made(ready, "q4_k_m")
    sizes = [exported(one, tmp_path / one.report["recipe"]["name"]).joinpath("model.gguf").stat().st_size
             for one in (quantized, uniform)]
    assert sizes[1] * 0.98 < sizes[0] <= sizes[1]
    assert np.isfinite(open_runtime("llama.cpp", tmp_path / name, 1).logprobs(tokens_of(Checkpoint("artifacts/model")))).all()


@pytest.mark.parametrize("name", ["q4_k_m-budget", "gptq-w4g128-budget"])
def test_a_budget_twice_gives_the_same_bytes(ready, name):
    def files() -> dict[str, bytes]:
        made(ready, name)
        return {path.name: path.read_bytes() for path in (ready.root / "artifacts/quantized" / name).iterdir()}

    first = files()
    assert files() == first and not [name for name in first if name.startswith("costs")]


def test_a_size_in_mib_is_that_of_the_file(ready, tmp_path):
    compose(ready, "+recipes.q4_k_m-budget.budget.size_mib=0.6")
    quantized = made(ready, "q4_k_m-budget")
    size = exported(quantized, tmp_path / "out").joinpath("model.gguf").stat().st_size
    assert 0.6 * 2**20 * 0.97 < size <= 0.6 * 2**20


def test_the_header_is_measured_to_the_byte(ready, tmp_path):
    quantized = made(ready, "q4_k_m")
    size = exported(quantized, tmp_path / "out").joinpath("model.gguf").stat().st_size
    data = sum(gguf.padded(quantized.blocks(name)[1].nbytes) for name in quantized.blocks_names)
    assert 0 <= gguf.header_bytes(Checkpoint("artifacts/model"), quantized.report) - (size - data) <= gguf.ALIGNMENT


@pytest.mark.parametrize(("name", "limit", "kind"), [("q4_k_m-budget", 4.0, "gguf"), ("gptq-w4g128-budget", 5.0, "safetensors")])
def test_bits_per_weight_are_those_of_the_manifest(ready, tmp_path, name, limit, kind):
    compose(ready, f"+recipes.{name}.budget.bits_per_weight={limit}")
    quantized = made(ready, name)
    runtime = {"gguf": "llama.cpp", "safetensors": "transformers"}[kind]
    found = bits_per_weight(quantized, exported(quantized, tmp_path / "out", format=kind, runtime=runtime), kind)
    assert limit * 0.96 < found <= limit


def test_what_overrides_name_stays_as_they_say(ready):
    compose(ready, "+recipes.q4_k_m-budget.overrides={attn_v: Q8_0, token_embd: Q2_K}")
    quantized = made(ready, "q4_k_m-budget")
    assert not [place for place in budget_of(quantized)["chosen"] if "attn_v" in place or "token_embd" in place]
    kinds = {name: about["actual"] for name, about in quantized.report["tensors"].items()}
    assert kinds["model.layers.0.self_attn.v_proj.weight"] == "Q8_0" and kinds["model.embed_tokens.weight"] == "Q2_K"


def test_layers_that_read_one_input_have_one_grid(ready, tmp_path):
    quantized = made(ready, "gptq-w4g128-budget")
    told, layers = budget_of(quantized), quantized.report["layers"]
    assert len(told["chosen"]) == 8 and 0 < told["predicted"] < 1.05 * told["predicted_without"]  # all layers are worth the same
    for linears, _ in architecture(Checkpoint("artifacts/model")).input_groups(1):
        assert len({(layers[name]["bits"], layers[name]["group_size"]) for name in linears}) == 1
        assert told["chosen"][linears[0]]["what"] == f"w{layers[linears[0]]['bits']}g{layers[linears[0]]['group_size']}"
    assert len({one["what"] for one in told["chosen"].values()}) > 1
    how, uniform = {"format": "safetensors", "runtime": "transformers"}, made(ready, "gptq-w4g128")
    sizes = [sum(path.stat().st_size for path in exported(one, tmp_path / one.report["recipe"]["name"], **how).iterdir())
             for one in (quantized, uniform)]
    assert sizes[1] * 0.9 < sizes[0] <= sizes[1]
    model = Checkpoint("artifacts/model")
    tokens = tokens_of(model)
    wanted = torch_logprobs(torch_model(model, quantized), tokens)
    ours = open_runtime("transformers", tmp_path / "gptq-w4g128-budget", 1).logprobs(tokens)
    assert np.abs(ours - wanted).max() < 1e-4
    onnx = exported(quantized, tmp_path / "onnx", format="onnx", runtime="onnxruntime")
    assert np.abs(open_runtime("onnxruntime", onnx, 1).logprobs(tokens) - wanted).max() < 1e-3


def test_a_layout_of_one_grid_refuses_a_mixture(ready, tmp_path):
    quantized = made(ready, "gptq-w4g128-budget")
    with pytest.raises(StageError, match="one width and group size") as error:
        exported(quantized, tmp_path / "out", format="safetensors", runtime="transformers", layout="gptq")
    assert error.value.failure == Failure.UNSUPPORTED_WIDTH


def test_awq_and_curvature_follow_the_choice(ready):
    compose(ready, "+recipes.gptq-w4g128-budget.rounding=gptq", "recipes.gptq-w4g128-budget.method=awq",
            "~recipes.gptq-w4g128-budget.act_order", "~recipes.gptq-w4g128-budget.damping",
            "recipes.gptq-w4g128-budget.curvature=true", "recipes.gptq-w4g128-budget.budget.bits=[3,8]")
    quantized = made(ready, "gptq-w4g128-budget")
    chosen, layers = budget_of(quantized)["chosen"], quantized.report["layers"]
    assert {about["bits"] for about in layers.values()} == {3, 8}
    assert all(f"w{layers[name]['bits']}g{layers[name]['group_size']}" == one["what"] for name, one in chosen.items())
    assert [one for one in quantized.report["transforms"] if one["step"] == "fold_scales"]


def refused(project, capsys, name: str, failure: Failure, words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        project.stage("quantize", name)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"quantize {name}: export_quantization_failed ({failure}): " in error and words in error
    last = project.events()[-1]
    assert (last["reason_code"], last["payload"]["failure"]) == (Reason.EXPORT_QUANTIZATION_FAILED, failure)
    return last["summary"]


@pytest.mark.parametrize(("name", "limit"), [
    ("q4_k_m-budget", "size_mib"), ("q4_k_m-budget", "bits_per_weight"), ("gptq-w4g128-budget", "size_mib")])
def test_a_budget_that_nothing_fits_in_tells_the_least(ready, capsys, name, limit):
    compose(ready, f"+recipes.{name}.budget.{limit}=0.2")
    told = refused(ready, capsys, name, Failure.CONFIG_INVALID, f"expected a budget of at least {limit}: ")
    least = re.search(r"at least \w+: ([\d.]+)", told)[1]
    assert "found 0.200; raise it" in told
    compose(ready, f"+recipes.{name}.budget.{limit}={least}")
    chosen = budget_of(made(ready, name))["chosen"]
    assert {one["what"] for one in chosen.values()} == ({"Q2_K"} if name == "q4_k_m-budget" else {"w2g128"})
    compose(ready, f"+recipes.{name}.budget.{limit}={float(least) - 0.002}")
    refused(ready, capsys, name, Failure.CONFIG_INVALID, least)


def test_types_that_are_all_larger_than_the_mix(ready, capsys):
    compose(ready, "recipes.q4_k_m-budget.budget.types=[Q6_K,Q8_0]")
    refused(ready, capsys, "q4_k_m-budget", Failure.CONFIG_INVALID, "expected a budget of at least size_mib: ")


def test_group_sizes_that_no_row_allows(ready, capsys, make_model, tmp_path):
    shutil.rmtree(ready.root / "artifacts/model")
    shutil.copytree(make_model(tmp_path / "odd", intermediate_size=320, num_hidden_layers=1), ready.root / "artifacts/model")
    ready.stage("calibrate")
    capsys.readouterr()
    compose(ready, "recipes.gptq-w4g128-budget.budget.group_sizes=[128]")
    refused(ready, capsys, "gptq-w4g128-budget", Failure.UNSUPPORTED_WIDTH, "add 32, or -1 for whole rows")


def test_a_calibration_from_before_there_were_budgets(ready, capsys):
    (ready.root / "artifacts/calibration/embedding.safetensors").unlink()
    refused(ready, capsys, "q4_k_m-budget", Failure.MISSING_FILE, "run `dvc repro calibrate`")


def test_costs_that_are_not_finite(ready, capsys):
    path = ready.root / "artifacts/calibration/final.safetensors"
    tensors = load_file(path) | {"peak": np.full(256, np.nan, np.float32)}
    from safetensors.numpy import save_file

    save_file(tensors, path)
    refused(ready, capsys, "q4_k_m-budget", Failure.NON_FINITE, "a finite cost of rounding model.embed_tokens.weight")


def test_without_gradients_shares_of_the_output_are_weighed(ready):
    path = ready.root / "artifacts/calibration" / ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"curvature": False}))
    told = budget_of(made(ready, "q4_k_m-budget"))
    assert told["unit"] == "share of the squared output" and 0 < told["predicted"] < told["predicted_without"]


def stopped_after(project, name: str, parts: int) -> None:
    """A quantize process that the system kills when it has worked out the costs of `parts` parts."""
    code = f"""
import os
from stages import quantize
from quantline.recipes.budget import fit as budget
from quantline.run.stage import stage_run
write, done = budget.write_json, []
def writing(path, value):
    write(path, value)
    done.append(path)
    if len(done) == {parts}:
        os.kill(os.getpid(), 9)
budget.write_json = writing
with stage_run("quantize", {name!r}) as run:
    quantize.quantize(run)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project.root, check=False, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9


def test_a_killed_run_goes_on_with_the_costs_that_it_has(ready, capsys, monkeypatch):
    name, worked_out = "q4_k_m-budget", []
    made(ready, name)
    folder = ready.root / "artifacts/quantized" / name
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(ready.root / "artifacts/quantized")
    stopped_after(ready, name, 2)
    of = Costs.of
    monkeypatch.setattr(Costs, "of", lambda self, tensor, *rest: (worked_out.append(tensor), of(self, tensor, *rest))[1])
    made(ready, name)
    assert "goes on where an earlier run stopped" in capsys.readouterr().out
    assert set(worked_out) == {"model.embed_tokens.weight"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted


def test_a_killed_run_does_not_go_on_with_another_budget(ready, capsys):
    stopped_after(ready, "q4_k_m-budget", 2)
    compose(ready, "+recipes.q4_k_m-budget.budget.bits_per_weight=4.5")
    made(ready, "q4_k_m-budget")
    assert "recipe changed since" in capsys.readouterr().out


def test_the_choice_is_no_part_of_the_recipe_that_is_told(ready):
    quantized = made(ready, "q4_k_m-budget")
    asked = load_params().recipes["q4_k_m-budget"].model_dump(mode="json")
    assert quantized.report["recipe"] == {"name": "q4_k_m-budget", **asked} and not asked["overrides"]


def test_a_work_without_grids_has_the_recipe_for_every_layer(ready):
    recipe = load_params().recipes["gptq-w4g128"]
    work = replace(work_of(ready.root / "artifacts"), recipe=recipe, grids={"a": {"bits": 2, "group_size": 32}})
    assert work.recipe_of("b") == recipe and (work.recipe_of("a").bits, work.recipe_of("a").group_size) == (2, 32)


def test_experts_of_a_block_are_chosen_for_together(ready, tmp_path, make_model):
    shutil.rmtree(ready.root / "artifacts/model")
    folder = make_model(tmp_path / "experts", "mixtral", intermediate_size=256, num_hidden_layers=1, num_local_experts=4,
                        num_experts_per_tok=2, tie_word_embeddings=False)
    shutil.copytree(folder, ready.root / "artifacts/model")
    ready.stage("calibrate")
    compose(ready, "recipes.gptq-w4g128-budget.symmetric=true", "recipes.gptq-w4g128-budget.budget.bits=[3,4,8]")
    types, grids = made(ready, "q4_k_m-budget"), made(ready, "gptq-w4g128-budget")
    assert {"output.weight", "token_embd.weight", "blk.0.ffn_down_exps.weight"} < set(budget_of(types)["chosen"])
    kinds = {types.blocks(name)[0] for name in types.blocks_names if ".experts." in name and name.endswith("w2.weight")}
    assert kinds == {budget_of(types)["chosen"]["blk.0.ffn_down_exps.weight"]["what"]}
    layers = grids.report["layers"]
    assert len({(about["bits"], about["group_size"]) for name, about in layers.items() if ".experts." in name}) == 1
    with pytest.raises(StageError, match="expected one grid for all layers of mixtral in safetensors, found") as error:
        exported(grids, tmp_path / "out", format="safetensors", runtime="transformers")
    assert error.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    model = Checkpoint("artifacts/model")
    wanted = torch_logprobs(torch_model(model, grids), tokens_of(model))
    onnx = exported(grids, tmp_path / "onnx", format="onnx", runtime="onnxruntime")
    assert np.abs(open_runtime("onnxruntime", onnx, 1).logprobs(tokens_of(model)) - wanted).max() < 1e-3
