"""The calls that people make in a notebook, and the example that quantline.api documents."""

import subprocess
import sys

import pytest

import quantline
from quantline import api
from quantline.errors import ConfigError
from tests.helpers.gguf import file_of

pytestmark = pytest.mark.xdist_group("api")  # one run of the example for all


def example() -> list[str]:
    """Return the statements of the example in the docstring of quantline.api."""
    lines = []
    for line in (api.__doc__ or "").splitlines():
        if line.startswith("    >>> "):
            lines.append(line.removeprefix("    >>> "))
    return lines


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_model, texts):
    """The names that the documented example defines, run in a folder of its own."""
    statements = example()
    assert len(statements) > 8
    folder = tmp_path_factory.mktemp("api")
    names: dict = {}
    source = "\n".join(statements).replace("path/to/model", str(tiny_model))
    for name in ("calibration.txt", "evaluation.txt"):
        source = source.replace(f'"{name}"', repr(str(texts / name)))
    source = source.replace('"work/', f'"{folder}/work/').replace("length=256", "length=64")
    exec(source, names)
    return names


def test_example_makes_a_measured_bundle(ran):
    bundle = ran["bundle"]
    assert file_of(bundle).is_file()
    assert (bundle / "manifest.json").is_file()
    quality = ran["results"].quality
    assert quality["artifact_sha256"]
    assert 0 <= quality["mean_kld"] < 1
    assert ran["results"].speed["decode_tok_s"] > 0


def test_compare_chooses_and_prints(ran):
    bundle = ran["bundle"]
    work = bundle.parents[1]
    comparison = api.compare([bundle], work / "metrics", ran["model"])
    assert comparison.pick == "q4_k_m"
    assert comparison.reasons
    assert "Ship for the smallest: q4_k_m" in str(comparison)
    gate = {"metric": "mean_kld", "operator": "<", "threshold": 1e-12}
    demands = api.smallest().model_dump() | {"gates": [gate]}
    refused = api.compare([bundle], work / "metrics", ran["model"], demands)
    assert refused.pick is None


def test_export_refuses_what_does_not_fit(ran, tmp_path):
    with pytest.raises(ConfigError, match="onnx carries the methods"):
        api.export(ran["model"], ran["weights"], tmp_path / "bundle", format="onnx")
    assert not (tmp_path / "bundle").exists()


def test_every_public_call_has_a_docstring():
    assert len(quantline.__all__) > 8
    for name in quantline.__all__:
        assert getattr(quantline, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quantline.nonsense  # noqa: B018 (the access is what is tested)


def test_import_quantline_is_light():
    code = "import sys, quantline; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "quantline" in modules
    heavy = {"numpy", "torch", "pydantic", "transformers", "numba", "mlflow"}
    assert not heavy & set(modules)
