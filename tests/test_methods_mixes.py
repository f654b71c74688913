"""The mixes: every tensor gets the type that llama.cpp gives it, in all mixes, for models of all kinds."""

import json
import re
from itertools import groupby
from pathlib import Path

import llama_quantize
import pytest
from gguf import GGUFReader

from quantline.methods.ggml import mixes
from quantline.config.recipes import GGML_TYPES, MIXES
from quantline.errors import Failure, StageError

GOLDEN = Path(__file__).parent / "golden" / "mixes.json"
# What llama.cpp's rules tell apart: depth, a tied head, shared keys, experts, widths that blocks do not divide.
MODELS = {
    "dense": {"layers": 17, "tied": True}, "untied": {"layers": 9, "heads": 8, "kv_heads": 2},
    "32 layers": {"layers": 32, "heads": 8, "kv_heads": 1}, "70B": {"layers": 80, "heads": 4, "kv_heads": 2, "tied": True},
    "65B": {"layers": 80}, "qwen2 80 layers": {"architecture": "qwen2", "layers": 80},
    "8 experts": {"layers": 17, "experts": 8, "heads": 8, "kv_heads": 2},
    "128 experts": {"architecture": "qwen3moe", "layers": 9, "experts": 128, "heads": 8, "kv_heads": 2},
    "fused": {"architecture": "phi3", "layers": 9, "fused": True}, "width 96": {"layers": 9, "width": 96, "tied": True},
    "width 80": {"layers": 9, "width": 80},
}


def facts(layers: int, heads: int = 4, kv_heads: int = 4, tied: bool = False, experts: int = 0, architecture: str = "llama",
          importance: bool = False, **rest) -> mixes.Model:
    is_70b = layers == 80 and (architecture == "qwen2" or heads != kv_heads)
    return mixes.Model(layers, tied, heads // kv_heads, experts, is_70b, importance)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(name, its settings, a file without data, the shapes in it)."""
    how = MODELS[request.param]
    source = llama_quantize.hollow(tmp_path_factory.mktemp("hollow") / "model.gguf", **how)
    return request.param, how, source, shapes(source)


def shapes(source: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in GGUFReader(source).tensors}


def ours(mix: str, there: dict[str, tuple[int, ...]], how: dict, importance: bool) -> dict[str, str]:
    known, found = facts(**how, importance=importance), {}
    for name, shape in there.items():
        kind = mixes.requested_type(mix, name, len(shape), known)
        touched = mixes.is_quantized(name, len(shape))
        found[name] = mixes.actual_type(mix, name, kind, shape[-1], known) if touched else kind
    return found


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
def test_types_are_those_of_llama_cpp(model, importance):
    _, how, source, there = model
    for mix in mixes.BASE:
        assert ours(mix, there, how, importance) == llama_quantize.types(source, mix, importance), mix


def listing(found: dict[str, str]) -> dict[str, str]:
    """{part: runs of types over the layers, such as `Q6_K x2, Q4_K x6`}."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, kind in found.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        parts.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), []).append((int(layer[1]) if layer else 0, kind))
    runs = {part: [(kind, len(list(run))) for kind, run in groupby(kind for _, kind in sorted(kinds))]
            for part, kinds in parts.items() if "norm" not in part}
    return {part: ", ".join(f"{kind} x{count}" for kind, count in run) for part, run in sorted(runs.items())}


def test_types_are_those_of_the_golden_listing(model):
    """So that a new llama.cpp with other rules, or a change of ours, is seen as what it is."""
    name, how, _, there = model
    golden = json.loads(GOLDEN.read_text())
    assert {mix: listing(ours(mix, there, how, importance=True)) for mix in mixes.BASE} == golden[name]


def test_the_schema_knows_every_mix_and_every_type():
    assert tuple(mixes.BASE) == MIXES
    kinds = {rule.kind for rules in mixes.RULES.values() for rule in rules}
    assert kinds | set(mixes.BASE.values()) | set(mixes.SUBSTITUTE.values()) == set(GGML_TYPES)


def test_an_unknown_mix_is_refused_with_those_that_there_are():
    with pytest.raises(StageError, match="Q4_K_M") as caught:
        mixes.requested_type("Q4_K_XXL", "blk.0.attn_q.weight", 2, facts(8))
    assert caught.value.failure == Failure.CONFIG_INVALID


def test_what_needs_an_importance_matrix_is_what_llama_cpp_refuses_without_one(tmp_path):
    how = {"layers": 9}
    source = llama_quantize.hollow(tmp_path / "model.gguf", **how)
    there, refused = shapes(source), []
    for mix in mixes.BASE:
        needed = [name for name, kind in ours(mix, there, how, False).items() if mixes.needs_importance(mix, name, kind)]
        _, said = llama_quantize.quantize(source, tmp_path / "none.gguf", mix, dry=True)
        assert bool(needed) == ("will require an imatrix" in said), mix
        refused += [mix] if needed else []
    assert refused == ["Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"]
