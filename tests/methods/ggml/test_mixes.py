"""Mixes: every tensor gets the type that llama.cpp gives it, for all kinds of models."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gguf import GGUFReader

from quantline.config.ggml_recipes import GGML_TYPES, MIXES
from quantline.errors import Failure, StageError
from quantline.methods.ggml import mixes
from quantline.methods.ggml.mix_rules import BASE_TYPES, RULES, ModelTraits
from tests.helpers import llama_quantize
from tests.helpers.project import ROOT

GOLDEN = ROOT / "tests/golden/mixes.json"
# What the rules distinguish: depth, a tied head, shared keys, experts, widths that blocks do not
# divide.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layers": 17, "tied": True},
    "untied": {"layers": 9, "heads": 8, "kv_heads": 2},
    "32 layers": {"layers": 32, "heads": 8, "kv_heads": 1},
    "70B": {"layers": 80, "heads": 4, "kv_heads": 2, "tied": True},
    "65B": {"layers": 80},
    "qwen2 80 layers": {"architecture": "qwen2", "layers": 80},
    "8 experts": {"layers": 17, "experts": 8, "heads": 8, "kv_heads": 2},
    "128 experts": {
        "architecture": "qwen3moe",
        "layers": 9,
        "experts": 128,
        "heads": 8,
        "kv_heads": 2,
    },
    "fused": {"architecture": "phi3", "layers": 9, "fused": True},
    "falcon": {"architecture": "falcon", "layers": 17, "fused": True},
    "hybrid": {"layers": 33, "attention_every": 3},
    "hybrid of 8 experts": {"layers": 33, "attention_every": 3, "experts": 8},
    "width 96": {"layers": 9, "width": 96, "tied": True},
    "width 80": {"layers": 9, "width": 80},
}


class EmptyModel(NamedTuple):
    """A file without data.

    Attributes:
        name: In MODELS.
        file: The file.
        shapes: Of its tensors.
    """

    name: str
    file: Path
    shapes: dict[str, tuple[int, ...]]


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for tensor in GGUFReader(file).tensors:
        shapes[tensor.name] = tuple(int(size) for size in reversed(tensor.shape))
    return shapes


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> EmptyModel:
    path = tmp_path_factory.mktemp("empty") / "model.gguf"
    file = llama_quantize.write_without_data(path, **MODELS[request.param])
    return EmptyModel(request.param, file, shapes_in(file))


def traits_of(settings: dict[str, Any], importance: bool) -> ModelTraits:
    """Return what the rules know of a model in MODELS."""
    layers = settings["layers"]
    heads = settings.get("heads", 4)
    kv_heads = settings.get("kv_heads", 4)
    is_qwen2 = settings.get("architecture") == "qwen2"
    return ModelTraits(
        layers,
        settings.get("tied", False),
        heads // kv_heads,
        settings.get("experts", 0),
        layers == 80 and (is_qwen2 or heads != kv_heads),
        importance,
        settings.get("architecture", "llama"),
    )


def types_of(mix: str, shapes: dict[str, tuple[int, ...]], traits: ModelTraits) -> dict[str, str]:
    """Return the type that each tensor gets."""
    types = {}
    places = mixes.places_of(mix, shapes, traits)
    for name, shape in shapes.items():
        ggml_type = mixes.requested_type(mix, name, len(shape), traits, places.get(name))
        if mixes.is_quantized(name, len(shape)):
            ggml_type = mixes.actual_type(mix, name, ggml_type, shape[-1], traits)
        types[name] = ggml_type
    return types


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
def test_requested_and_actual_types_are_llama_cpps(model, importance):
    traits = traits_of(MODELS[model.name], importance)
    assert BASE_TYPES
    for mix in BASE_TYPES:
        expected = llama_quantize.types_of(model.file, mix, importance)
        assert types_of(mix, model.shapes, traits) == expected, mix


def listing(types: dict[str, str]) -> dict[str, str]:
    """Return part → runs of types over the layers, such as `Q6_K x2, Q4_K x6`."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, ggml_type in types.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        part = re.sub(r"^blk\.\d+\.|\.weight$", "", name)
        parts.setdefault(part, []).append((int(layer[1]) if layer else 0, ggml_type))
    runs = {}
    for part, numbered in sorted(parts.items()):
        if "norm" in part:
            continue
        in_order = [ggml_type for _, ggml_type in sorted(numbered)]
        lengths = [(ggml_type, len(list(run))) for ggml_type, run in groupby(in_order)]
        runs[part] = ", ".join(f"{ggml_type} x{length}" for ggml_type, length in lengths)
    return runs


def test_types_are_those_of_the_golden_listing(model):
    """A new llama.cpp with other rules, or a change of ours, is seen as what it is."""
    golden = json.loads(GOLDEN.read_text())[model.name]
    traits = traits_of(MODELS[model.name], importance=True)
    assert {mix: listing(types_of(mix, model.shapes, traits)) for mix in BASE_TYPES} == golden


def test_recipes_know_every_mix_and_every_type():
    assert tuple(BASE_TYPES) == MIXES
    types = {*BASE_TYPES.values(), *mixes.SUBSTITUTES.values()}
    for rules in RULES.values():
        types |= {rule.ggml_type for rule in rules if rule.ggml_type}
    assert types == set(GGML_TYPES)


def test_requested_type_refuses_an_unknown_mix_with_those_that_there_are():
    traits = ModelTraits(8, False)
    with pytest.raises(StageError, match="Q4_K_M") as caught:
        mixes.requested_type("Q4_K_XXL", "blk.0.attn_q.weight", 2, traits)
    assert caught.value.failure == Failure.CONFIG_INVALID


def test_needs_importance_is_what_llama_cpp_refuses_without(tmp_path):
    settings = {"layers": 9}
    file = llama_quantize.write_without_data(tmp_path / "model.gguf", **settings)
    shapes = shapes_in(file)
    traits = traits_of(settings, importance=False)
    refused = []
    for mix in BASE_TYPES:
        types = types_of(mix, shapes, traits)
        needed = [name for name in types if mixes.needs_importance(mix, name, types[name])]
        _, log = llama_quantize.quantize(file, tmp_path / "none.gguf", mix, dry_run=True)
        assert bool(needed) == ("will require an imatrix" in log), mix
        if needed:
            refused.append(mix)
    assert refused == [
        "Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS",
    ]  # fmt: skip
