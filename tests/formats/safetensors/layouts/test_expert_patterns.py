"""The groups of experts in a quantization_config, by the rules of those who read it."""

import re
from itertools import product

import pytest

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.layouts.compressed_tensors import (
    PackedIntegers,
    expert_patterns,
)
from quantline.quantized.tensors import Scheme

NUMBERS = product((0, 7), (0, 12), (1, 2))
EXPERTS = [
    f"model.layers.{n}.mlp.experts.{e}.w{i}" for n in (0, 7) for e in (0, 12) for i in (1, 2)
]
OTHERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_experts.up_proj"]
SYMMETRIC = Scheme("int4", True, 64, per_row=False)
GROUPS = Scheme("int4", False, 128, per_row=False)
SMALLER = Scheme("int3", False, 64, per_row=False)


def match_of(name: str, patterns: list[str]) -> bool:
    return any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)


def test_expert_patterns_match_what_servers_call_experts():
    patterns = expert_patterns(EXPERTS)
    assert patterns == [r"re:.*\.mlp\.experts\.\d+\."]
    assert all(match_of(name, patterns) for name in EXPERTS)
    assert not any(match_of(name, patterns) for name in OTHERS)
    # vLLM asks for the first expert's layers by these names, whatever a file calls them.
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert match_of(f"language_model.model.layers.3.mlp.experts.0.{part}", patterns)


@pytest.mark.parametrize(
    ("layer", "pattern"),
    [
        ("model.layers.3.mlp.input_linear.5", r"re:(?#experts).*\.mlp\.input_linear\.\d+$"),
        ("model.blocks.3.moe.experts", r"re:model\.blocks\.3\.moe\.experts$"),
    ],
)
def test_expert_patterns_say_that_they_are_of_experts(layer, pattern):
    """transformers looks for a pattern with the word in it."""
    assert expert_patterns([layer]) == [pattern]
    assert match_of(layer, [pattern])


def targets(schemes: dict[Scheme, list[str]]) -> list[list[str]]:
    config = PackedIntegers().config(schemes, ["lm_head"], EXPERTS)
    for scheme, names in schemes.items():
        for name in names:
            assert PackedIntegers().stored_type(config, name) == scheme.kind
    return [group["targets"] for group in config["config_groups"].values()]


def test_config_has_a_group_for_experts_if_they_differ():
    patterns = expert_patterns(EXPERTS)
    assert targets({SYMMETRIC: [*EXPERTS, *OTHERS]}) == [["Linear"]]
    assert targets({SYMMETRIC: EXPERTS}) == [["Linear"]]
    assert targets({SYMMETRIC: EXPERTS, GROUPS: OTHERS}) == [patterns, ["Linear"]]
    several = {SYMMETRIC: EXPERTS, GROUPS: OTHERS[:1], SMALLER: OTHERS[1:]}
    assert targets(several) == [patterns, OTHERS[1:], OTHERS[:1]]
    alike = {SYMMETRIC: [*EXPERTS, OTHERS[0]], GROUPS: OTHERS[1:]}
    assert targets(alike) == [patterns, OTHERS[1:], OTHERS[:1]]


def test_stored_type_of_a_layer_in_no_group_is_refused():
    config = PackedIntegers().config({SYMMETRIC: EXPERTS, GROUPS: OTHERS}, [])
    del config["config_groups"]["group_1"]
    with pytest.raises(StageError, match="found it in none") as caught:
        PackedIntegers().stored_type(config, "model.other")
    assert caught.value.failure == Failure.READBACK_MISMATCH
