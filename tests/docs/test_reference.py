"""The generated tables have every option and everything that is registered."""

import importlib.util
from types import ModuleType

import pytest

from quantline.config.containers import CONTAINERS
from quantline.config.params import Params
from quantline.config.recipes import RECIPES
from quantline.config.runtimes import RUNTIMES
from quantline.config.stale import flatten
from quantline.metrics.figure import FIGURES
from quantline.model.family import FAMILIES
from tests.helpers.project import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The Sphinx extension, which is no package of its own."""
    pytest.importorskip("sphinx")
    path = ROOT / "docs/_ext/quantline_reference.py"
    spec = importlib.util.spec_from_file_location("quantline_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(table: str) -> set[str]:
    """Return what stands in the first column of tables."""
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    return {row.strip("`") for row in rows}


def test_options_has_every_key_of_params_yaml(reference):
    from quantline.config.compose import load_params

    found = keys_of(reference.options())
    params = load_params(ROOT / "params.yaml").model_dump(mode="json")
    for section in ("model", "calibration", "evaluation", "target", "tracking"):
        for key in flatten({section: params[section]}):
            if not key.startswith(("evaluation.pythons", "target.gates")):
                assert key in found
    assert {"target.gates[].metric", "variants.<name>.layout", "evaluation.pythons"} <= found


def test_recipes_has_every_option_of_every_method(reference):
    table = reference.recipes()
    for name, recipe in RECIPES.items():
        section = table.split(f"## {name}\n")[1].split("\n## ")[0]
        found = keys_of(section)
        assert recipe.model_fields and set(recipe.model_fields) <= found


@pytest.mark.parametrize(
    "table, registry",
    [
        ("methods", RECIPES),
        ("formats", CONTAINERS),
        ("runtimes", RUNTIMES),
        ("families", FAMILIES),
        ("metrics", FIGURES),
    ],
)
def test_tables_have_everything_that_is_registered(reference, table, registry):
    assert len(registry) and keys_of(reference.TABLES[table]()) == set(registry)


def test_value_text_says_what_an_option_takes(reference):
    rows = {row[0]: row[1:3] for row in reference.option_rows(RECIPES["gptq"], "")}
    assert rows["`bits`"] == ["`2`, `3`, `4`, `8`", "required"]
    assert rows["`damping`"] == ["number above 0", "`0.01`"]
    assert rows["`act_order`"] == ["`true`, `false`", "`true`"]
    assert rows["`budget`"] == ["section or `null`", "`null`"]
    assert rows["`budget.size_mib`"] == ["number above 0 or `null`", "`null`"]


def test_every_option_is_described(reference):
    sections = [Params.model_fields[name].annotation for name in ("model", "calibration", "target")]
    for section in [*sections, *RECIPES.values()]:
        for key, *_, described in reference.option_rows(section, ""):
            assert described or key in UNDESCRIBED, key


# The schema says nothing of these, whose names say all.
UNDESCRIBED = {
    "`name`",
    "`gates[].operator`",
    "`gates[].threshold`",
    "`optimize.metric`",
    "`optimize.direction`",
    "`hardware.name`",
}
