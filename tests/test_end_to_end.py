"""The real `dvc repro` on a tiny model: from a checkpoint to the page, with a variant that fails.

A setting mends it, a sweep reruns what it changes alone, and an edit of conf/ is noticed.
"""

import shutil

import pytest

from quantline import links
from tests.helpers.clone import Clone
from tests.helpers.project import tiny_inputs

VARIANTS = ("bf16", "gguf-q8_0", "gptq-w4g128", "onnx-int4-gptq")
OF_GPTQ = ("gptq-w4g128", "onnx-int4-gptq")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, make_model, texts, empty_database) -> Clone:
    """A clone with a model whose feed-forward width, 320, the recipe's groups do not divide."""
    root = tmp_path_factory.mktemp("clone")
    odd = tmp_path_factory.mktemp("odd") / "model"
    model = make_model(odd, intermediate_size=320, num_hidden_layers=1)
    shutil.copy(empty_database, root / "mlflow.db")
    overrides = [
        "recipe=[none,q8_0,gptq-w4g128]",
        f"variant=[{','.join(VARIANTS)}]",
        *tiny_inputs(model, texts),
        "evaluation.speed.threads=1",
        "recipes.gptq-w4g128.group_size=128",
    ]
    return Clone.begin(root, overrides)


def check_a_failure_stops_its_own_variants_alone(clone: Clone) -> None:
    """A recipe that does not fit fails by name; the others go on, and the page shows both."""
    printed = clone.quantline("repro", expect=1)
    assert "export_quantization_failed (unsupported_width)" in printed
    assert "group_size can be 64, 32" in printed
    rows = clone.report()
    assert {name for name in rows if rows[name]["status"] == "ok"} == {"bf16", "gguf-q8_0"}
    assert {row["failure"] for row in rows.values()} == {None, "unsupported_width"}
    assert "unsupported_width" in (clone.root / "reports/compression.html").read_text()
    assert not (clone.root / "artifacts/quantized/gptq-w4g128").exists()


def check_the_named_setting_mends_it(clone: Clone) -> None:
    """And nothing else runs again."""
    before = clone.finished()
    clone.overrides[-1] = "recipes.gptq-w4g128.group_size=32"
    clone.quantline("repro")
    rows = clone.report()
    assert set(rows) == set(VARIANTS)
    assert {row["status"] for row in rows.values()} == {"ok"}
    expected = [("check", None), ("compare", None), ("quantize", "gptq-w4g128")]
    for stage in ("evaluate", "export"):
        expected += [(stage, name) for name in OF_GPTQ]
    assert sorted(clone.finished()[len(before) :], key=str) == sorted(expected, key=str)
    kld = {name: figures["mean_kld"] for name, figures in clone.figures().items()}
    assert abs(kld["bf16"]) < 1e-4 < kld["gptq-w4g128"]
    assert kld["gguf-q8_0"] < kld["gptq-w4g128"]
    assert kld["onnx-int4-gptq"] == pytest.approx(kld["gptq-w4g128"], rel=0.05)


def check_artifacts_are_on_disk_once(clone: Clone) -> None:
    """What DVC caches is a link to its cache, or shares its blocks where the file system can."""
    cached = [path for path in (clone.root / ".dvc/cache").rglob("*") if path.is_file()]
    inodes = {path.stat().st_ino for path in cached}
    shares_blocks = links.clone(cached[0], clone.root / "shared")
    for folder in ("calibration", "reference", "quantized/q8_0", "exports/gguf-q8_0"):
        files = [path for path in (clone.root / "artifacts" / folder).rglob("*") if path.is_file()]
        assert files
        assert shares_blocks or all(path.stat().st_ino in inodes for path in files), folder


def check_nothing_runs_when_nothing_changed(clone: Clone) -> None:
    before = clone.finished()
    assert "Data and pipelines are up to date." in clone.dvc("repro")
    assert clone.finished() == before


def check_a_sweep_reruns_its_recipe_alone(clone: Clone) -> None:
    """DVC composes anew: the choices are given again."""
    before = clone.finished()
    figures = clone.figures()
    clone.commit("baseline")
    settings = []
    for override in [*clone.overrides, "recipes.gptq-w4g128.bits=3"]:
        settings += ["-S", override]
    clone.dvc("exp", "run", "--name", "three-bits", *settings)
    ran = clone.finished()[len(before) :]
    assert {stage for stage, _ in ran} == {"check", "quantize", "export", "evaluate", "compare"}
    assert {name for _, name in ran} == {*OF_GPTQ, None}
    swept = clone.figures()
    assert swept["gptq-w4g128"]["mean_kld"] > figures["gptq-w4g128"]["mean_kld"]
    assert swept["bf16"] == figures["bf16"]
    assert "three-bits" in clone.dvc("exp", "show", "--csv")
    assert "gptq-w4g128" in clone.dvc("metrics", "show")
    plots = clone.dvc("plots", "show", "--json")
    assert "reports/plots/mean_kld.svg" in plots
    assert "reports/plots/gold_accuracy.svg" in plots
    assert "error" not in plots


def check_an_edit_of_conf_is_noticed_before_anything_runs(clone: Clone) -> None:
    recipe = clone.root / "conf/recipe/q8_0.yaml"
    text = recipe.read_text()
    assert "importance: false" in text
    recipe.write_text(text.replace("importance: false", "importance: true"))
    printed = clone.dvc("repro", expect=255)
    assert "config_stale" in printed
    assert "quantline compose" in printed


@pytest.mark.slow
@pytest.mark.e2e
def test_repro_leads_from_a_checkpoint_to_the_page(clone):
    check_a_failure_stops_its_own_variants_alone(clone)
    check_the_named_setting_mends_it(clone)
    check_artifacts_are_on_disk_once(clone)
    check_nothing_runs_when_nothing_changed(clone)
    check_a_sweep_reruns_its_recipe_alone(clone)
    check_an_edit_of_conf_is_noticed_before_anything_runs(clone)
