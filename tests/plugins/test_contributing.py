"""A method, a container, a runtime, a family and a metric, each from one file outside quantline.

The files are the examples of CONTRIBUTING.md. They are put into a package of their own, which names
them as entry points, and the pipeline runs with them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

GROUPS = {
    "method": "quantline.methods",
    "container": "quantline.formats",
    "runtime": "quantline.runtimes",
    "family": "quantline.families",
    "metric": "quantline.metrics",
}
# One run of the pipeline for all, which takes half a minute.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("plugins")]

EXAMPLE = re.compile(r"^```python plugin=(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def write_distribution(folder: Path) -> None:
    """Write the examples as an installed distribution whose entry points name them."""
    package = folder / "sample_plugins"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    entry_points = ""
    kinds = []
    for kind, source in EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()):
        (package / f"{kind}.py").write_text(source)
        entry_points += f"[{GROUPS[kind]}]\n{kind} = sample_plugins.{kind}\n\n"
        kinds.append(kind)
    assert sorted(kinds) == sorted(GROUPS)  # one of each
    info = folder / "sample_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture(scope="module")
def project(tmp_path_factory, texts) -> Path:
    """A project in which every stage ran with the plugins."""
    plugins = tmp_path_factory.mktemp("plugins")
    write_distribution(plugins)
    root = tmp_path_factory.mktemp("project")
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.run_pipeline", str(root), str(texts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(plugins), str(ROOT)])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_plugin_family_and_method_quantize_a_model(project):
    assert read(project / "artifacts/model/manifest.json")["model_type"] == "arcee"
    report = read(project / "artifacts/quantized/row-clip/quantized.json")
    assert report["recipe"]["method"] == "row-clip"
    assert report["recipe"]["steps"] == 10  # its own default
    layers = report["layers"]
    assert len(layers) == 2 * 6  # four of attention and two of the feed-forward part in each block
    for name, layer in layers.items():
        assert layer["error"] <= layer["rtn_error"], name
    assert any(layer["error"] < layer["rtn_error"] for layer in layers.values())


def test_plugin_container_is_read_back(project):
    manifest = read(project / "artifacts/exports/dense/manifest.json")
    assert manifest["format"] == "dense"
    assert {tensor["actual"] for tensor in manifest["tensors"].values()} == {"F32"}


def test_plugin_runtime_serves_bundles(project):
    smoke = read(project / "artifacts/exports/bf16/smoke.json")
    assert smoke["runtime"] == "transformers-bf16"
    assert smoke["passed"]
    assert read(project / "metrics/bf16.json")["runtime"] == "transformers-bf16"


def test_plugin_metric_is_measured_and_decides(project):
    for variant in ("dense", "bf16"):
        metrics = read(project / f"metrics/{variant}.json")
        assert 0 <= metrics["kld_above_tenth"] <= 1
        assert metrics["kld_above_tenth_se"] >= 0
    report = read(project / "reports/compression.json")
    assert report["pick"] in ("dense", "bf16")
    for row in report["variants"]:
        assert [gate["metric"] for gate in row["gates"]] == ["kld_above_tenth"]
    assert "KL &gt; 0.1, %" in (project / "reports/compression.html").read_text()
