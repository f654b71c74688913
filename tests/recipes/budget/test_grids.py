"""Budgets over grids of grouped integers: sizes, and layers that have to be alike."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as onnx_file
import pytest
import torch

from quantline.config.compose import load_params
from quantline.errors import Failure, StageError
from quantline.formats.container import load_container
from quantline.formats.onnx import sizes
from quantline.formats.safetensors.layouts.compressed_tensors import PackedIntegers
from quantline.methods.integer.grid import Grid
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.budget.container_sizes import packed_bytes
from quantline.recipes.budget.grid_labels import grid_label, parse_grid
from quantline.recipes.budget.grids import GridPlan
from quantline.runtimes.runtime import open_runtime
from tests.helpers.budget import (
    MODEL,
    assert_refused,
    bits_per_weight,
    budget_of,
    compose,
    context_in,
    export,
    options_of,
    quantize,
)
from tests.helpers.models import place_model
from tests.helpers.project import Project
from tests.helpers.quantized import differing, tokens_of, torch_logprobs, torch_model

NAME = "gptq-w4g128-budget"


def keep_inputs_in_float32(path: Path) -> None:
    """Take away that products with 8-bit weights round their inputs: the weights alone count."""
    model = onnx_file.load(path)
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if attribute.name == "accuracy_level":
                node.attribute.remove(attribute)
    onnx_file.save(model, path)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (3, 64), (4, 128), (8, -1)])
def test_packed_bytes_are_those_of_the_layers_tensors(bits, group_size, symmetric):
    weight = torch.randn(36, 128, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits, 128 if group_size == -1 else group_size, symmetric)
    linear = round_to_nearest(weight, grid)
    tensors = PackedIntegers().tensors("x", linear, np.float16)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert packed_bytes(weight.shape, bits, group_size, symmetric, 2) == size


def test_parse_grid_undoes_grid_label():
    for grid in ((2, 32), (4, 128), (8, -1)):
        assert parse_grid(grid_label(*grid)) == grid
    assert grid_label(4, 128) == "w4g128"


def grid_of(report: dict) -> str:
    return grid_label(report["bits"], report["group_size"])


@pytest.mark.slow
def test_grid_plan_gives_layers_that_read_one_input_one_grid(ready, tmp_path):
    quantized = quantize(ready, NAME)
    step = budget_of(quantized)
    grids = options_of(quantized)
    layers = quantized.report["layers"]
    assert len(grids) == 8
    # All layers of a random model are worth about the same.
    assert 0 < step["predicted"] < 1.05 * step["predicted_without"]
    groups = Checkpoint(MODEL).arch.input_groups(1)
    assert len(groups) == 4
    for group in groups:
        linears = group.linears
        assert {grid_of(layers[name]) for name in linears} == {grids[linears[0]]}
    assert len(set(grids.values())) > 1
    uniform = quantize(ready, "gptq-w4g128")
    sizes = []
    for store in (quantized, uniform):
        bundle = export(store, tmp_path / store.report["recipe"]["name"], "safetensors")
        sizes.append(sum(path.stat().st_size for path in bundle.iterdir()))
    assert sizes[1] * 0.9 < sizes[0] <= sizes[1]
    source = Checkpoint(MODEL)
    tokens = tokens_of(source)
    expected = torch_logprobs(torch_model(source, quantized), tokens)
    logprobs = open_runtime("transformers", tmp_path / NAME, 1).logprobs(tokens)
    assert np.abs(logprobs - expected).max() < 1e-4
    onnx = export(quantized, tmp_path / "onnx", "onnx")
    assert differing(load_container("onnx"), onnx, source, quantized) == []
    expected = torch_logprobs(torch_model(source, quantized, outside=True), tokens)
    keep_inputs_in_float32(onnx / "model.onnx")
    logprobs = open_runtime("onnxruntime", onnx, 1).logprobs(tokens)
    assert np.abs(logprobs - expected).max() < 1e-3


@pytest.mark.slow
def test_several_grids_are_refused_by_a_layout_of_one(ready, tmp_path):
    quantized = quantize(ready, NAME)
    with pytest.raises(StageError, match="one width and group size") as error:
        export(quantized, tmp_path / "out", "safetensors", layout="gptq")
    assert error.value.failure == Failure.UNSUPPORTED_WIDTH


@pytest.mark.slow
def test_awq_and_curvature_follow_the_choice(ready):
    compose(
        ready,
        f"+recipes.{NAME}.rounding=gptq",
        f"recipes.{NAME}.method=awq",
        f"~recipes.{NAME}.act_order",
        f"~recipes.{NAME}.damping",
        f"recipes.{NAME}.curvature=true",
        f"recipes.{NAME}.budget.bits=[3,8]",
    )
    quantized = quantize(ready, NAME)
    layers = quantized.report["layers"]
    assert {report["bits"] for report in layers.values()} == {3, 8}
    grids = options_of(quantized)
    assert {name: grid_of(layers[name]) for name in grids} == grids
    assert budget_of(quantized)["rounding"] == "gptq"
    assert any(step["step"] == "fold_scales" for step in quantized.report["transforms"])


def test_grid_plan_refuses_group_sizes_that_no_row_allows(ready, capsys, make_model, tmp_path):
    shutil.rmtree(ready.root / MODEL)
    odd = make_model(tmp_path / "odd", intermediate_size=320, num_hidden_layers=1)
    place_model(odd, ready.root / MODEL)
    ready.stage("calibrate")
    capsys.readouterr()
    compose(ready, f"recipes.{NAME}.budget.group_sizes=[128]")
    words = "add 32, or -1 for whole rows"
    assert_refused(ready, capsys, NAME, Failure.UNSUPPORTED_WIDTH, words)


def test_grid_plan_chooses_the_bits_of_a_head_in_integers(ready, make_model, tmp_path):
    shutil.rmtree(ready.root / MODEL)
    untied = make_model(tmp_path / "untied", num_hidden_layers=1, tie_word_embeddings=False)
    place_model(untied, ready.root / MODEL)
    ready.stage("calibrate")
    chosen = {}
    for limit in ("bits_per_weight=6", "bits_per_weight=9"):
        compose(
            ready,
            f"recipes.{NAME}.safetensors_head=true",
            f"recipes.{NAME}.budget.bits=[4,8]",
            f"recipes.{NAME}.budget.{limit}",
        )
        quantized = quantize(ready, NAME)
        chosen[limit] = options_of(quantized)["lm_head"]
        packed = export(quantized, tmp_path / limit, "safetensors")
        assert bits_per_weight(packed, "safetensors") <= float(limit.partition("=")[2])
        stored = PackedIntegers().shape(Checkpoint(packed), "lm_head")
        assert stored == Checkpoint(MODEL).shape("lm_head.weight")
        head = quantized.with_outside(["lm_head"]).linear("lm_head")
        assert grid_label(head.bits, head.group_size) == chosen[limit]
    assert chosen["bits_per_weight=6"].startswith("w4"), chosen
    assert chosen["bits_per_weight=9"] == "w8g32", chosen


def compose_for_onnx(project: Project, bits: str = "4,8", **budget: float) -> None:
    """Write params.yaml with a budget whose sizes are those in ONNX."""
    limits = [f"recipes.{NAME}.budget.{key}={value}" for key, value in budget.items()]
    choices = [f"recipes.{NAME}.budget.bits=[{bits}]", f"recipes.{NAME}.budget.format=onnx"]
    compose(project, *choices, *limits)


def bytes_of(bundle: Path) -> int:
    """Return the bytes of a graph with its weights."""
    return sum(path.stat().st_size for path in bundle.glob("model.onnx*"))


@pytest.mark.parametrize(
    "largest_inside", [pytest.param(0, marks=pytest.mark.slow), sizes.LARGEST_INSIDE]
)
def test_a_budget_in_onnx_without_a_limit_is_that_of_the_recipe_alone(
    ready, make_model, tmp_path, monkeypatch, largest_inside
):
    monkeypatch.setattr(sizes, "LARGEST_INSIDE", largest_inside)
    shutil.rmtree(ready.root / MODEL)
    place_model(make_model(tmp_path / "one", num_hidden_layers=1), ready.root / MODEL)
    ready.stage("calibrate")
    compose_for_onnx(ready, bits="2,3,4,8")
    bundles = {}
    for name in ("gptq-w4g128", NAME):
        quantized = quantize(ready, name)
        bundles[name] = export(quantized, tmp_path / name, "onnx")
    assert len(set(options_of(quantized).values())) > 1
    assert not any(grid.startswith("w3") for grid in options_of(quantized).values())
    assert (bundles[NAME] / "model.onnx.data").exists() == (largest_inside == 0)
    assert 0.6 * bytes_of(bundles["gptq-w4g128"]) < bytes_of(bundles[NAME])
    assert bytes_of(bundles[NAME]) <= bytes_of(bundles["gptq-w4g128"])


def test_bits_of_layers_do_not_take_an_embeddings_own_away(ready):
    recipe = load_params().recipes[NAME]
    budget = recipe.budget.model_copy(update={"format": "onnx", "bits": (2,)})
    ctx = context_in(ready.root / "artifacts")
    ctx = replace(ctx, recipe=recipe.model_copy(update={"budget": budget}))
    plan = GridPlan(ctx, {})
    assert plan.options["model.embed_tokens"] == ["w8g32"]
    assert {label[:2] for label in plan.options[ctx.arch.linears()[0]]} == {"w2"}


def test_layers_that_several_blocks_share_are_in_a_budget_once(ready, monkeypatch):
    recipe = load_params().recipes[NAME]
    ctx = replace(context_in(ready.root / "artifacts"), recipe=recipe)
    first = ctx.arch.input_groups(0)
    monkeypatch.setattr(type(ctx.arch), "input_groups", lambda _, layer: first)
    plan = GridPlan(ctx, {})
    assert [name for names in plan.linears.values() for name in names] == [
        name for group in first for name in group.linears
    ]


def test_grid_plan_chooses_the_bits_of_a_tied_embedding_in_onnx(ready, make_model, tmp_path):
    shutil.rmtree(ready.root / MODEL)
    place_model(make_model(tmp_path / "tied", num_hidden_layers=1), ready.root / MODEL)
    ready.stage("calibrate")
    chosen = {}
    for limit in (4.7, 9):
        compose_for_onnx(ready, bits_per_weight=limit)
        quantized = quantize(ready, NAME)
        assert budget_of(quantized)["format"] == "onnx"
        chosen[limit] = options_of(quantized)["model.embed_tokens"]
        held = quantized.with_outside(["model.embed_tokens"]).linear("model.embed_tokens")
        assert grid_label(held.bits, held.group_size) == chosen[limit]
    bundle = export(quantized, tmp_path / "out", "onnx")
    assert 0.9 * limit < bits_per_weight(bundle, "onnx") <= limit
    assert differing(load_container("onnx"), bundle, Checkpoint(MODEL), quantized) == []
    assert chosen[4.7].startswith("w4") and chosen[9] == "w8g32", chosen


def test_grid_plan_chooses_for_an_embedding_and_a_head_of_its_own_in_onnx(
    ready, make_model, tmp_path
):
    shutil.rmtree(ready.root / MODEL)
    untied = make_model(tmp_path / "untied", num_hidden_layers=1, tie_word_embeddings=False)
    place_model(untied, ready.root / MODEL)
    ready.stage("calibrate")
    compose_for_onnx(ready, size_mib=0.55)
    quantized = quantize(ready, NAME)
    assert {"model.embed_tokens", "lm_head"} < options_of(quantized).keys()
    bundle = export(quantized, tmp_path / "out", "onnx")
    assert (bundle / "model.onnx").stat().st_size <= 0.55 * 2**20
    assert differing(load_container("onnx"), bundle, Checkpoint(MODEL), quantized) == []


def test_a_budget_in_onnx_leaves_an_embedding_in_floats_that_is_to_stay(ready):
    recipe = load_params().recipes[NAME]
    budget = recipe.budget.model_copy(update={"format": "onnx"})
    ctx = context_in(ready.root / "artifacts")
    plans = {}
    for bits in (8, None):
        options = {"budget": budget, "embedding_bits": bits}
        plans[bits] = GridPlan(replace(ctx, recipe=recipe.model_copy(update=options)), {})
    assert plans[8].options.keys() - plans[None].options.keys() == {"model.embed_tokens"}
    halves = 2 * int(np.prod(ctx.source.shape(ctx.arch.embedding)))
    assert plans[None].fixed_bytes - plans[8].fixed_bytes == halves


def test_recipe_of_a_layer_without_a_choice_is_the_recipe(ready):
    stated = {"group_size": 128, "symmetric": False}
    recipe = load_params().recipes["gptq-w4g128"].model_copy(update=stated)
    ctx = replace(context_in(ready.root / "artifacts"), recipe=recipe)
    chosen, other, *_ = ctx.arch.linears()
    ctx = replace(ctx, grids={chosen: {"bits": 2, "group_size": 32}})
    assert ctx.recipe_of(other) == recipe
    assert (ctx.recipe_of(chosen).bits, ctx.recipe_of(chosen).group_size) == (2, 32)


@pytest.mark.slow
def test_grid_plan_and_type_plan_choose_for_all_experts_of_a_block_together(
    ready, tmp_path, make_model
):
    shutil.rmtree(ready.root / MODEL)
    experts = make_model(
        tmp_path / "experts",
        "mixtral",
        intermediate_size=256,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    place_model(experts, ready.root / MODEL)
    ready.stage("calibrate")
    compose(ready, f"recipes.{NAME}.budget.bits=[3,4,8]")
    in_blocks = quantize(ready, "q4_k_m-budget")
    types = options_of(in_blocks)
    assert {"output.weight", "token_embd.weight", "blk.0.ffn_down_exps.weight"} < set(types)
    down = [name for name in in_blocks.ggml_names if re.search(r"\.experts\..*w2\.weight", name)]
    assert len(down) == 4
    types_of_experts = {in_blocks.ggml_blocks(name).type for name in down}
    assert types_of_experts == {types["blk.0.ffn_down_exps.weight"]}
    grouped = quantize(ready, NAME)
    layers = grouped.report["layers"]
    grids = {grid_of(report) for name, report in layers.items() if ".experts." in name}
    assert len(grids) == 1
    source = Checkpoint(MODEL)
    tokens = tokens_of(source)
    expected = torch_logprobs(torch_model(source, grouped), tokens)
    packed = export(grouped, tmp_path / "out", "safetensors")
    found = open_runtime("transformers", packed, 1).logprobs(tokens)
    # transformers expands experts in the precision of their scales.
    assert np.abs(found - expected).max() < 0.02
    onnx = export(grouped, tmp_path / "onnx", "onnx")
    assert differing(load_container("onnx"), onnx, source, grouped) == []
    expected = torch_logprobs(torch_model(source, grouped, outside=True), tokens)
    keep_inputs_in_float32(onnx / "model.onnx")
    logprobs = open_runtime("onnxruntime", onnx, 1).logprobs(tokens)
    assert np.abs(logprobs - expected).max() < 1e-3
