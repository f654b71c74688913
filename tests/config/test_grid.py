"""The grid's files: what is written for combinations of options, and that conf/ is such files."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml

from quantline.cli.grid import grid_options
from quantline.config import grid
from quantline.config.compose import compose
from quantline.config.grid import GridPoint, write_grid
from quantline.config.recipes import RECIPES
from quantline.errors import ConfigError
from tests.helpers.project import ROOT

CONF = ROOT / "conf"


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """conf/ of a project of its own."""
    shutil.copytree(CONF, tmp_path / "conf")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf"


def contents(conf: Path) -> dict[str, str]:
    return {str(path.relative_to(conf)): path.read_text() for path in conf.rglob("*.yaml")}


def written(conf: Path, before: dict[str, str]) -> set[str]:
    """Return the files of conf/ that are new or changed."""
    return {name for name, text in contents(conf).items() if before.get(name) != text}


def test_write_grid_writes_a_recipe_and_a_variant_for_each_combination(conf):
    before = contents(conf)
    points = write_grid(conf, "rtn", {"bits": [2, 8], "group_size": [64, -1]})
    names = ["rtn-w2g64", "rtn-w2grow", "rtn-w8g64", "rtn-w8grow"]
    assert points == [GridPoint(name, name) for name in names]
    assert written(conf, before) == {
        "suite/sweep.yaml",
        *(f"recipe/{name}.yaml" for name in names),
        *(f"variant/{name}.yaml" for name in names),
    }
    assert (conf / "recipe/rtn-w2grow.yaml").read_text() == (
        "# @package recipes.rtn-w2grow\n"
        "defaults: [_rtn@_here_, _self_]\n"
        "\n"
        "bits: 2\n"
        "group_size: -1\n"
    )
    assert (conf / "variant/rtn-w2grow.yaml").read_text() == (
        "# @package variants.rtn-w2grow\n"
        "defaults: [_variant@_here_, _self_]\n"
        "\n"
        "recipe: rtn-w2grow\n"
    )
    assert (conf / "suite/sweep.yaml").read_text() == (
        "# @package _global_\n"
        "# Written by `quantline grid`.\n"
        "defaults:\n"
        "  - /recipe:\n"
        "      - none\n" + "".join(f"      - {name}\n" for name in names) + "  - /variant:\n"
        "      - bf16\n" + "".join(f"      - {name}\n" for name in names) + "\n"
        "suite: sweep\n"
    )


def test_write_grid_makes_a_suite_that_composes(conf):
    write_grid(conf, "gptq", {"damping": [0.05], "act_order": [True, False]}, "onnx", "mine")
    composed = compose(["suite=mine"])
    assert composed["suite"] == "mine"
    assert list(composed["recipes"]) == [
        "none",
        "gptq-w4g128-damping0_05",
        "gptq-w4g128-act_orderfalse-damping0_05",
    ]
    recipe = composed["recipes"]["gptq-w4g128-act_orderfalse-damping0_05"]
    assert recipe == grid.base_options(CONF, "gptq") | {"damping": 0.05, "act_order": False}
    variant = composed["variants"]["onnx-gptq-w4g128-damping0_05"]
    assert (variant["recipe"], variant["format"], variant["runtime"]) == (
        "gptq-w4g128-damping0_05",
        "onnx",
        "onnxruntime",
    )


def test_write_grid_tells_128_in_every_layer_from_at_most_128(conf):
    before = contents(conf)
    points = write_grid(conf, "gptq", {"group_size": ["auto", 128, 32]})
    names = ["gptq-w4g128", "gptq-w4g128-group_size128", "gptq-w4g32"]
    assert points == [GridPoint(name, name) for name in names]
    assert {name for name in written(conf, before) if name.startswith("recipe/")} == {
        "recipe/gptq-w4g128-group_size128.yaml"
    }
    sizes = [recipe.get("group_size") for recipe in compose(["suite=sweep"])["recipes"].values()]
    assert sizes == [None, "auto", 128, 32]


def test_write_grid_adds_to_a_suite_and_names_nothing_twice(conf):
    comment, recipes, variants = grid.read_suite(conf / "suite/quick.yaml")
    points = write_grid(conf, "gptq", {"bits": [4, 3, 3]}, suite="quick")
    assert points == [
        GridPoint("gptq-w4g128", "gptq-w4g128"),
        GridPoint("gptq-w3g128", "gptq-w3g128"),
    ]
    assert grid.read_suite(conf / "suite/quick.yaml") == (
        comment,
        [*recipes, "gptq-w3g128"],
        [*variants, "gptq-w3g128"],
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n",
        "defaults: 3\n",
        "suite: mine\n",
        "defaults: [{/recipe: [none]}]\n",
        "defaults: [{/recipe: [none], /variant: [bf16]}]\nrecipes: {none: {method: none}}\n",
        "defaults: [{/recipe: [none]}, {/variant: [bf16]}, {/target: edge}]\n",
        "defaults: [{/recipe: none}, {/variant: 3}]\n",
        "defaults: [_self_]\n",
        "a: [\n",
        "\0",
    ],
)
def test_write_grid_refuses_a_suite_whose_content_it_would_lose(conf, text):
    path = conf / "suite/mine.yaml"
    path.write_text(text)
    before = contents(conf)
    with pytest.raises(ConfigError, match="expected a suite with lists of recipes and variants"):
        write_grid(conf, "gptq", {"bits": [3]}, suite="mine")
    assert contents(conf) == before


@pytest.mark.parametrize("arguments", [["--bits="], ["--bits", ""]])
def test_grid_refuses_an_option_without_values(arguments):
    with pytest.raises(ConfigError, match="--bits, found none"):
        grid_options(arguments)


@pytest.mark.parametrize("again", [["--bits", "4"], ["--bits=3"]])
def test_grid_refuses_an_option_twice_in_place_of_dropping_the_first(again):
    with pytest.raises(ConfigError, match=r"all values of --bits once, .* found it twice"):
        grid_options(["--bits", "3", *again])


def test_write_grid_leaves_files_that_exist_as_they_are(conf):
    before = contents(conf)
    budgets = [{}, {"bits_per_weight": 3.5}, {"size_mib": 12}]
    points = write_grid(conf, "kquant", {"budget": budgets})
    assert [point.recipe for point in points] == [
        "q4_k_m-budget",
        "q4_k_m-budget3_5bpw",
        "q4_k_m-budget12mib",
    ]
    assert "recipe/q4_k_m-budget.yaml" in before
    assert written(conf, before) == {
        "suite/sweep.yaml",
        "recipe/q4_k_m-budget3_5bpw.yaml",
        "recipe/q4_k_m-budget12mib.yaml",
        "variant/gguf-q4_k_m-budget3_5bpw.yaml",
        "variant/gguf-q4_k_m-budget12mib.yaml",
    }
    # What the schema would fill in stands in the file.
    budget = yaml.safe_load((conf / "recipe/q4_k_m-budget12mib.yaml").read_text())["budget"]
    assert budget == {
        "size_mib": 12,
        "bits_per_weight": None,
        "types": ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"],
    }


@pytest.mark.parametrize(
    ("method", "options", "container", "message"),
    [
        ("gtpq", {}, None, r"unknown method 'gtpq' \(did you mean gptq\?\)"),
        ("gptq", {"bitts": [3]}, None, "gptq has no option bitts; it has act_order, bits, "),
        ("gptq", {"bits": [4, 5]}, None, r"gptq\.bits: .*2, 3, 4 or 8, found 5"),
        ("gptq", {"budget": [{"size": 3}]}, None, r"gptq has no option budget\.size"),
        ("gptq", {}, "ggf", r"unknown format 'ggf' \(did you mean gguf\?\)"),
        ("gptq", {}, "gguf", "gguf carries the methods kquant, kquant-curvature, none, found gptq"),
        ("kquant", {"overrides": [{"a+b": "F16"}, {"a*b": "F16"}]}, None, "expected no other"),
    ],
)
def test_write_grid_refuses_what_is_unknown_and_writes_nothing(
    conf, method, options, container, message
):
    before = contents(conf)
    with pytest.raises(ConfigError, match=message):
        write_grid(conf, method, options, container)
    assert contents(conf) == before


def test_write_grid_does_not_write_over_another_recipe_of_that_name(conf):
    path = conf / "recipe/gptq-w2g128.yaml"
    path.write_text("# @package recipes.gptq-w2g128\nmethod: none\nsubstitution: fail\n")
    before = contents(conf)
    with pytest.raises(ConfigError, match=r"no other recipe called gptq-w2g128 .*; rename it"):
        write_grid(conf, "gptq", {"bits": [2]})
    assert contents(conf) == before


def test_base_options_needs_the_base_file(conf):
    (conf / "recipe/_gptq.yaml").unlink()
    with pytest.raises(ConfigError, match=r"expected .*_gptq\.yaml with all options of gptq"):
        grid.base_options(conf, "gptq")


@pytest.mark.parametrize("method", RECIPES)
def test_base_options_has_every_option_of_the_method(method):
    base = grid.base_options(CONF, method)
    recipe_class = RECIPES[method]
    assert set(base) == set(recipe_class.model_fields)
    assert recipe_class.model_validate(base).model_dump(mode="json") == base


@cache
def everything() -> dict[str, dict[str, dict]]:
    """Return all recipes and variants of conf/, as they compose."""
    sections: dict[str, dict[str, dict]] = {"recipes": {}, "variants": {}}
    for suite in ("full", "layouts", "genai", "vllm"):
        composed = compose([f"suite={suite}"], ROOT)
        for section in sections:
            sections[section] |= composed[section]
    return sections


def committed(group: str) -> list[Path]:
    paths = sorted(path for path in (CONF / group).glob("*.yaml") if path.stem[0] != "_")
    assert paths
    return paths


@pytest.mark.parametrize("path", committed("recipe"), ids=lambda path: path.stem)
def test_recipe_yaml_makes_every_committed_recipe(path):
    options = everything()["recipes"][path.stem]
    base = grid.base_options(CONF, options["method"])
    text = grid.recipe_yaml(path.stem, options, base, grid.comment_of(path))
    assert text == path.read_text()


@pytest.mark.parametrize("path", committed("variant"), ids=lambda path: path.stem)
def test_variant_yaml_makes_every_committed_variant(path):
    options = everything()["variants"][path.stem]
    base = yaml.safe_load((CONF / "variant/_variant.yaml").read_text())
    different = {key: value for key, value in options.items() if base[key] != value}
    method = everything()["recipes"][options["recipe"]]["method"]
    assert grid.variant_yaml(path.stem, different, method) == path.read_text()


@pytest.mark.parametrize("path", committed("suite"), ids=lambda path: path.stem)
def test_suite_yaml_makes_every_committed_suite(path):
    composed = compose([f"suite={path.stem}"], ROOT)
    text = grid.suite_yaml(
        path.stem, grid.comment_of(path), composed["recipes"], composed["variants"]
    )
    assert text == path.read_text()


def test_recipe_name_tells_the_recipes_of_the_full_suite_apart():
    names = {}
    for name, options in everything()["recipes"].items():
        recipe = RECIPES[options["method"]].model_validate(options)
        base = grid.base_options(CONF, options["method"])
        names[name] = grid.recipe_name(recipe, base)
    assert len(set(names.values())) == len(names)
    # The names in conf/ are these, but for some that people chose.
    together = {
        f"awq-gptq-{grid_name}-curvature": f"awq-{grid_name}-curvature-roundinggptq"
        for grid_name in ("w3g32", "w3g128", "w4g32", "w4g128")
    }
    assert {name: made for name, made in names.items() if made != name} == together | {
        "awq-gptq-w2g32-curvature-refined": "awq-w2g32-curvature-roundinggptq-refined16",
        "gptq-w2g32-refined": "gptq-w2g32-refined16",
        "rtn-w8": "rtn-w8g128-symmetrictrue",
        "smoothquant-w8a8": "smoothquant",
        "fp8-w8a8": "fp8",
        "q8_0": "q8_0-importancefalse",
    }


@pytest.mark.parametrize(
    ("refine", "name"),
    [
        ({"steps": 0}, "gptq-w4g64"),
        ({"steps": 8}, "gptq-w4g64-refined8"),
        (
            {"steps": 8, "sequences": 2},
            "gptq-w4g64-refine_steps__8__learning_rate__0_002__sequences__2_",
        ),
    ],
)
def test_recipe_name_has_the_steps_of_refinement(refine, name):
    base = grid.base_options(CONF, "gptq")
    options = base | {"group_size": 64, "refine": base["refine"] | refine}
    assert grid.recipe_name(RECIPES["gptq"].model_validate(options), base) == name
