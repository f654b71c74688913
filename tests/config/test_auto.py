"""`auto` in recipes of grouped integers: what it becomes in a layer, and what else is refused."""

import pytest
from pydantic import ValidationError

from quantline.config.recipes import GroupedRecipe, largest_group, parse_recipe

AUTO = {"method": "gptq", "bits": 4, "group_size": "auto", "symmetric": "auto"}


def recipe(**options) -> GroupedRecipe:
    parsed = parse_recipe(AUTO | options)
    assert isinstance(parsed, GroupedRecipe)
    return parsed


@pytest.mark.parametrize(
    ("widths", "size"),
    [
        ((4096,), 128),
        ((128,), 128),
        ((576,), 64),
        ((64,), 64),
        ((96,), 32),
        ((1056,), 32),
        ((80,), -1),
        ((100,), -1),
        ((576, 1536), 64),
        ((576, 96), 32),
        ((576, 80), -1),
    ],
)
def test_largest_group_divides_all_widths(widths, size):
    assert largest_group(widths) == size


@pytest.mark.parametrize(("width", "size"), [(128, 32), (96, 32), (80, -1)])
def test_largest_group_of_eight_bits_is_the_smallest_there_is(width, size):
    assert largest_group((width,), bits=8) == size


def test_for_layer_gives_experts_alone_a_fixed_zero_point():
    layer = recipe().for_layer([576])
    assert (layer.group_size, layer.symmetric) == (64, False)
    layer = recipe().for_layer([2880, 960], of_expert=True)
    assert (layer.group_size, layer.symmetric) == (64, True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_for_layer_keeps_what_a_recipe_states(size, symmetric):
    stated = recipe(group_size=size, symmetric=symmetric)
    assert stated.for_layer([100], of_expert=True) is stated


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 48}, "Input should be 'auto', 32, 64, 128 or -1"),
        ({"group_size": "Auto"}, "Input should be 'auto', 32, 64, 128 or -1"),
        ({"symmetric": "no"}, "Input should be True, False or 'auto'"),
        ({"budget": {"group_sizes": [32, "auto"]}}, "Input should be 32, 64, 128 or -1"),
    ],
)
def test_parse_recipe_says_what_can_stand_there(options, words):
    with pytest.raises(ValidationError, match=words) as caught:
        recipe(**options)
    assert caught.value.error_count() == 1
