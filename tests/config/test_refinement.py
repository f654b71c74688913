"""The options of refinement: what can stand there, and what is refused."""

import pytest

from quantline.config.compose import compose
from quantline.config.recipes import RECIPES, GroupedRecipe, parse_recipe
from quantline.config.refinement import Refinement
from quantline.config.validation import validate
from quantline.errors import ConfigError
from tests.helpers.project import ROOT

RECIPE = "recipes.gptq-w2g32-refined"


def composed(*overrides: str):
    values = compose(["suite=quick", "+recipe=gptq-w2g32-refined", *overrides], ROOT)
    return validate(values).recipes["gptq-w2g32-refined"]


def test_compose_takes_steps_of_a_recipe_without_them():
    params = compose(["suite=quick", "recipes.gptq-w4g128.refine.steps=16"], ROOT)
    options = params["recipes"]["gptq-w4g128"]["refine"]
    assert options == {"steps": 16, "learning_rate": 0.002, "sequences": 4}


def test_recipes_refine_nothing_unless_they_say_so():
    recipe = parse_recipe({"method": "gptq", "bits": 2, "group_size": 64, "symmetric": False})
    assert isinstance(recipe, GroupedRecipe) and recipe.refine == Refinement(steps=0)
    assert composed().refine.steps == 16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=-1", "greater than or equal to 0, found -1"),
        ("steps=1.5", "valid integer"),
        ("learning_rate=0", "greater than 0, found 0"),
        ("learning_rate=0.5", "less than or equal to 0.1, found 0.5"),
        ("learning_rate=nan", "finite number"),
        ("sequences=0", "greater than 0, found 0"),
        ("+rounds=3", "rounds"),
    ],
)
def test_validate_refuses_what_is_no_refinement(override, words):
    plus, override = ("+", override[1:]) if override[0] == "+" else ("", override)
    with pytest.raises(ConfigError, match=words):
        composed(f"{plus}{RECIPE}.refine.{override}")


def test_validate_refuses_a_text_of_which_nothing_could_be_held_out():
    with pytest.raises(ConfigError) as caught:
        composed("calibration.sequences=4")
    assert str(caught.value).startswith(f"{RECIPE}.refine: expected a calibration text of at least")
    assert "5 sequences" in str(caught.value) and "found 4; set" in str(caught.value)
    assert composed("calibration.sequences=5")
    assert composed("calibration.sequences=4", f"{RECIPE}.refine.steps=0")


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_only_recipes_of_grouped_integers_can_refine(method):
    fields = RECIPES[method].model_fields
    assert ("refine" in fields) == issubclass(RECIPES[method], GroupedRecipe)


def test_outside_of_blocks_nothing_is_refined():
    outside = composed().outside(64)
    assert outside.refine.steps == 0
