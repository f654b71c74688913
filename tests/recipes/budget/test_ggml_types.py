"""Budgets over ggml's types: the file fits, and what it costs is less than with one mix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.container import ALIGNMENT, header_bytes, padded_size
from quantline.model.checkpoint import Checkpoint
from quantline.recipes.budget.ggml_types import TypePlan
from quantline.runtimes.runtime import open_runtime
from tests.helpers.budget import (
    MODEL,
    budget_of,
    compose,
    context_in,
    export,
    options_of,
    quantize,
)
from tests.helpers.ggml_recipes import context_of, kquant
from tests.helpers.gguf import file_of
from tests.helpers.quantized import tokens_of

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
GGUF_NAMES = {
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.embed_tokens.weight": "token_embd.weight",
}


@pytest.mark.parametrize(
    "name", ["q4_k_m-budget", pytest.param("q4_k_m-curvature-budget", marks=pytest.mark.slow)]
)
def test_type_plan_fits_the_size_of_the_mix_and_costs_less(ready, tmp_path, name):
    quantized = quantize(ready, name)
    step = budget_of(quantized)
    types = options_of(quantized)
    assert len(types) == 15
    assert set(types.values()) <= set(TYPES)
    assert len(set(types.values())) > 1
    assert step["unit"].startswith("nats")
    assert step["rounding"].startswith("ggml")
    assert ("feedback" in step["rounding"]) == ("curvature" in name)
    assert 0 < step["predicted"] < step["predicted_without"]
    chosen = step["chosen"].values()
    assert step["bytes"] == sum(option["bytes"] for option in chosen)
    assert step["bytes"] <= step["limit_bytes"]
    assert step["predicted"] == pytest.approx(sum(option["cost"] for option in chosen))
    assert step["price_per_mib"] > 0
    tensors = quantized.report["tensors"]
    for tensor, gguf_name in GGUF_NAMES.items():
        report = tensors[tensor]
        assert report["actual"] == report["requested"] == types[gguf_name]
        assert quantized.ggml_blocks(tensor).type == types[gguf_name]
    uniform = quantize(ready, "q4_k_m")
    sizes = []
    for store in (quantized, uniform):
        bundle = export(store, tmp_path / store.report["recipe"]["name"])
        sizes.append(file_of(bundle).stat().st_size)
    assert sizes[1] * 0.98 < sizes[0] <= sizes[1]
    runtime = open_runtime("llama.cpp", tmp_path / name, 1)
    assert np.isfinite(runtime.logprobs(tokens_of(Checkpoint(MODEL)))).all()


def test_type_plan_counts_a_size_in_mib_for_the_whole_file(ready, tmp_path):
    compose(ready, "+recipes.q4_k_m-budget.budget.size_mib=0.6")
    bundle = export(quantize(ready, "q4_k_m-budget"), tmp_path / "out")
    size = file_of(bundle).stat().st_size
    assert 0.6 * 2**20 * 0.97 < size <= 0.6 * 2**20


def test_header_bytes_are_those_of_the_file(ready, tmp_path):
    quantized = quantize(ready, "q4_k_m")
    size = file_of(export(quantized, tmp_path / "out")).stat().st_size
    assert quantized.ggml_names
    data = sum(
        padded_size(quantized.ggml_blocks(name).data.nbytes) for name in quantized.ggml_names
    )
    header = header_bytes(Checkpoint(MODEL), quantized.report)
    assert 0 <= header - (size - data) <= ALIGNMENT


def test_type_plan_keeps_what_overrides_name(ready):
    compose(ready, "+recipes.q4_k_m-budget.overrides={attn_v: Q8_0, token_embd: Q2_K}")
    quantized = quantize(ready, "q4_k_m-budget")
    types = options_of(quantized)
    assert types
    assert not any("attn_v" in item or "token_embd" in item for item in types)
    tensors = quantized.report["tensors"]
    assert tensors["model.layers.0.self_attn.v_proj.weight"]["actual"] == "Q8_0"
    assert tensors["model.embed_tokens.weight"]["actual"] == "Q2_K"


def type_plan(artifacts: Path, **options: Any) -> TypePlan:
    """Return the plan of a recipe that may choose a type that needs importance."""
    ctx = context_in(artifacts)
    recipe = kquant("Q4_K_M", budget={"types": ["IQ2_XXS", "Q4_K"]}, **options)
    ctx = context_of(recipe, ctx.source, ctx.calibration, artifacts)
    return TypePlan(ctx, {"name": "budget", **recipe})


def test_type_plan_offers_no_type_that_needs_importance_without_it(ready):
    """The embedding has none."""
    plan = type_plan(ready.root / "artifacts")
    assert plan.options["blk.0.ffn_up.weight"] == ["IQ2_XXS", "Q4_K"]
    assert plan.options["token_embd.weight"] == ["Q4_K"]


def test_type_plan_refuses_such_types_in_blocks_without_importance(ready):
    with pytest.raises(StageError, match="IQ2_XXS is garbage without one") as caught:
        type_plan(ready.root / "artifacts", importance=False)
    assert caught.value.failure == Failure.IMPORTANCE_MISSING
