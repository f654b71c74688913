"""Registries: entries of a package and of other distributions, and what is said of mistakes."""

import sys
from pathlib import Path

import pytest

from quantline.config.containers import CONTAINERS
from quantline.config.recipes import RECIPES
from quantline.config.runtimes import RUNTIMES
from quantline.errors import ConfigError
from quantline.model.family import FAMILIES
from quantline.registry import SOURCES, Registry, load_object, load_registrations

GROUP = "quantline.test_shapes"


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """An importable package of two modules, each of which registers a shape."""
    folder = tmp_path / "shapes_of_the_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from quantline.registry import Registry\n"
        "SHAPES = Registry('shape')\nCOLOURS = Registry('colour')\n"
    )
    for name in ("square", "circle"):
        (folder / f"{name}.py").write_text(
            f"from shapes_of_the_test import SHAPES\nSHAPES.add({name!r}, {name.upper()!r})\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SOURCES, GROUP, folder.name)
    load_registrations.cache_clear()
    yield folder.name
    load_registrations.cache_clear()
    for name in [name for name in sys.modules if name.startswith((folder.name, "triangles"))]:
        del sys.modules[name]


@pytest.fixture
def shapes(package) -> Registry[str]:
    """The registry of that package; nothing has been read from it."""
    import shapes_of_the_test

    return shapes_of_the_test.SHAPES


def install(site: Path, entry_points: str, **modules: str) -> None:
    """Put a distribution with entry points and modules where Python finds it."""
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    info = site / "triangles-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triangles\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_points}\n")


def test_registry_imports_every_module_of_its_package_when_it_is_first_read(shapes):
    assert "shapes_of_the_test.square" not in sys.modules
    assert list(shapes) == ["circle", "square"]
    assert "shapes_of_the_test.square" in sys.modules
    assert shapes["square"] == "SQUARE"
    assert len(shapes) == 2
    assert shapes.values() == ["CIRCLE", "SQUARE"]
    assert shapes.items() == [("circle", "CIRCLE"), ("square", "SQUARE")]
    assert "circle" in shapes
    assert "cube" not in shapes
    assert None not in shapes


def test_registry_lists_its_names_for_an_unknown_one_and_hints_at_the_nearest(shapes):
    with pytest.raises(ConfigError) as error:
        shapes["sqare"]
    assert str(error.value) == (
        "unknown shape 'sqare' (did you mean square?); there are circle, square"
    )
    assert shapes.unknown("zzz") == "unknown shape 'zzz'; there are circle, square"


def test_register_refuses_a_name_that_is_taken(shapes):
    @shapes.register("cube")
    def cube() -> None:
        """Stand in for an entry."""

    assert shapes["cube"] is cube
    with pytest.raises(ConfigError, match="expected one shape called cube, found two"):
        shapes.register("cube")(cube)
    with pytest.raises(ConfigError, match="expected one shape called square, found two"):
        shapes.add("square", "again")
    assert shapes["square"] == "SQUARE"


def test_registry_finds_entry_points_of_other_distributions(shapes, tmp_path):
    install(
        tmp_path,
        "triangle = triangles",
        triangles="from shapes_of_the_test import SHAPES\nSHAPES.add('triangle', 'TRIANGLE')\n",
    )
    assert list(shapes) == ["circle", "square", "triangle"]
    assert shapes["triangle"] == "TRIANGLE"


def test_a_module_may_register_in_several_registries(shapes, tmp_path):
    """Whichever of them is read first: a container may bring its runtime along."""
    install(
        tmp_path,
        "triangle = triangles",
        triangles="from shapes_of_the_test import COLOURS, SHAPES\n"
        "SHAPES.add('triangle', 'TRIANGLE')\nCOLOURS.add('red', '#f00')\n",
    )
    from shapes_of_the_test import COLOURS

    assert list(COLOURS) == ["red"]
    assert "triangle" in shapes


def test_registry_names_two_plugins_with_one_name(shapes, tmp_path):
    install(
        tmp_path,
        "square = triangles",
        triangles="from shapes_of_the_test import SHAPES\nSHAPES.add('square', 'TRIANGLE')\n",
    )
    with pytest.raises(ConfigError, match="expected one shape called square, found two"):
        list(shapes)


@pytest.mark.parametrize(
    ("entry_point", "module", "message"),
    [
        ("triangles", "import no_such_module_of_the_test", "ModuleNotFoundError"),
        ("triangles:Triangle", "", "AttributeError"),
        ("no_such_module_of_the_test", "", "ModuleNotFoundError"),
    ],
)
def test_registry_names_a_plugin_that_does_not_import(
    shapes, tmp_path, entry_point, module, message
):
    install(tmp_path, f"triangle = {entry_point}", triangles=module)
    expected = (
        rf"expected the plugin triangle of {GROUP} \({entry_point}\) to load, found {message}"
    )
    for _ in range(2):  # it is not taken for loaded the second time
        with pytest.raises(ConfigError, match=expected + ".*; mend or uninstall the plugin"):
            list(shapes)


def test_a_failing_module_of_the_package_is_no_plugin_error(shapes, tmp_path):
    (tmp_path / "shapes_of_the_test/wrong.py").write_text("raise ZeroDivisionError\n")
    with pytest.raises(ZeroDivisionError):
        list(shapes)


def test_quantlines_registries_hold_what_it_is_delivered_with():
    assert list(RECIPES) == [
        "awq", "fp8", "gptq", "int8", "kquant", "kquant-curvature", "none", "rtn", "smoothquant",
    ]  # fmt: skip
    assert list(CONTAINERS) == ["gguf", "onnx", "safetensors"]
    assert list(RUNTIMES) == [
        "llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "vllm",
    ]  # fmt: skip
    assert set(FAMILIES) == {
        "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma2", "gemma3_text",
        "phi", "phi3", "gpt2", "gpt_neox", "starcoder2",
    }  # fmt: skip


def test_load_object_imports_what_a_reference_names():
    assert load_object("quantline.registry:Registry") is Registry
    with pytest.raises(ImportError):
        load_object("quantline.no_such_module:Registry")
    with pytest.raises(AttributeError):
        load_object("quantline.registry:NoSuchName")


@pytest.mark.parametrize("registry", [RECIPES, CONTAINERS, RUNTIMES], ids=lambda entry: entry.kind)
def test_implementations_that_entries_name_exist(registry):
    """They are imported when they are used, so a wrong name would be found late."""
    references = []
    for name, entry in registry.items():
        reference = getattr(entry, "implementation", None) or getattr(entry, "engine", None)
        if reference is None:
            assert name == "none", "only the recipe that quantizes nothing has no implementation"
            continue
        references.append(reference)
        assert isinstance(load_object(reference), type), reference
    assert references
