"""`quantline publish`: what lies on the Hub afterwards, and what never gets there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from quantline.files import sha256_file
from quantline.model.gguf_files import model_files
from tests.helpers.changes import flip_one_byte
from tests.helpers.command_line import quantline
from tests.helpers.hub import NAME, Hub, serve_hub
from tests.helpers.project import ROOT
from tests.helpers.receiving_hub import TOKEN, receiving_handler

VARIANT = "gguf-q4_k_m"
OTHER = "gguf-q4_k_s"
EXPORTS = Path("artifacts/exports")
STAGED = Path(".quantline/publish/you--tiny")


@pytest.fixture
def hub(tmp_path):
    """An empty repository on the loopback."""
    folder = tmp_path / "repository"
    folder.mkdir()
    with serve_hub(folder, tmp_path / "home", receiving_handler()) as server:
        yield server


def publish(hub: Hub, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run `quantline publish` with a Hub of its own."""
    return subprocess.run(
        [sys.executable, "-m", "quantline.cli", "publish", *arguments, "--to", NAME],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | hub.environment | {"PYTHONPATH": str(ROOT), "HF_TOKEN": token},
    )


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def test_publish_uploads_a_bundle_that_verifies_by_itself(project, hub):
    before = hashes(EXPORTS / VARIANT)
    (hub.folder / "notes.txt").write_text("of the owner")
    done = publish(hub, VARIANT)
    assert done.returncode == 0, done.stderr
    assert f"published: {hub.environment['HF_ENDPOINT']}/{NAME}/commit/" in done.stdout
    assert hashes(EXPORTS / VARIANT) == before
    manifest = json.loads((EXPORTS / VARIANT / "manifest.json").read_text())
    found = hashes(hub.folder)
    files = {*manifest["files"], "manifest.json", "smoke.json", "README.md", "notes.txt"}
    assert set(found) == files
    for name, entry in manifest["files"].items():
        assert found[name] == entry["sha256"]
    (hub.folder / "notes.txt").unlink()
    (hub.folder / ".gitattributes").touch()
    answer = quantline("verify", str(hub.folder), "--figures", f"metrics/{VARIANT}.json")
    assert answer.exit_code == 0, answer.output
    assert not STAGED.exists()

    # Another bundle in its place leaves no file of this one, and what is the owner's.
    (hub.folder / "notes.txt").touch()
    assert publish(hub, OTHER).returncode == 0
    assert len(model_files(hub.folder)) == 1
    assert (hub.folder / "notes.txt").exists()


def test_publish_writes_a_card_with_the_figures(project):
    answer = quantline("publish", VARIANT, "--to", NAME, "--base-model", "you/base", "--dry-run")
    assert answer.exit_code == 0, answer.output
    assert "not uploaded" in answer.output
    text = (STAGED / "README.md").read_text()
    data = ModelCard(text).data
    metrics = json.loads(Path(f"metrics/{VARIANT}.json").read_text())
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {
        "perplexity": metrics["perplexity"],
        "kl_divergence": metrics["mean_kld"],
        "same_top_token": metrics["same_top_p"],
        "accuracy": metrics["gold_accuracy"],
    }
    assert data.base_model == "you/base"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert "model-index" in yaml.safe_load(text.split("---\n")[1])
    for part in ("## Evaluation", "## All variants", "## Serve it", "## How it was made"):
        assert part in text
    assert f"| {OTHER}" in text
    assert metrics["artifact_sha256"] in text
    assert "sha256 of the evaluation text" in text
    assert "llama-server -hf you/tiny:Q4_K_M" in text
    assert str(Path.cwd()) not in text


def test_publish_puts_several_variants_into_folders_that_verify(project):
    answer = quantline("publish", VARIANT, OTHER, "--to", NAME, "--dry-run")
    assert answer.exit_code == 0, answer.output
    for name in (VARIANT, OTHER):
        assert quantline("verify", str(STAGED / name)).exit_code == 0
        assert f"[{name}]({name}/README.md)" in (STAGED / "README.md").read_text()
    assert ModelCard((STAGED / "README.md").read_text()).data.eval_results


def test_publish_names_no_folder_of_this_machine(project, tmp_path):
    assert quantline("publish", VARIANT, "--to", NAME, "--dry-run").exit_code == 0
    source = json.loads((STAGED / "manifest.json").read_text())["source"]
    assert (source["path"], source["adapter"]) == ("model", "adapter")
    assert not (STAGED / "lineage.json").exists()


def test_publish_refuses_a_bundle_that_was_changed(project):
    (path,) = model_files(EXPORTS / VARIANT)
    flip_one_byte(path)
    answer = quantline("publish", VARIANT, "--to", NAME, "--dry-run")
    assert answer.exit_code == 1
    assert "artifact_changed" in answer.output
    assert not STAGED.exists()


def test_publish_refuses_a_variant_that_fails_a_required_gate(project):
    gate = "{metric: mean_kld, operator: '<=', threshold: 0.0, required: true}"
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["target"]["gates"] = [yaml.safe_load(gate)]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    answer = quantline("publish", VARIANT, "--to", NAME, "--dry-run")
    assert answer.exit_code == 1
    assert "publication_refused" in answer.output
    assert "mean_kld is" in answer.output
    assert not STAGED.exists()


def test_publish_refuses_two_files_of_one_name(project):
    from quantline.errors import StageError
    from quantline.publish.staging import check_tags
    from tests.helpers.report import make_row

    rows = [make_row("a", 5, 0.1), make_row("b", 5, 0.1)]
    check_tags(rows[:1])
    with pytest.raises(StageError, match=r"a and b are both model\.gguf"):
        check_tags(rows)


def test_publish_refuses_names_that_are_none(project):
    for arguments in (
        ("nothing", "--to", NAME),
        (VARIANT, "--to", "a/b/c"),
        (VARIANT, "--to", "x"),
    ):
        answer = quantline("publish", *arguments)
        assert answer.exit_code == 1
        assert "config_invalid: expected" in answer.output


def test_publish_says_when_the_hub_refuses(project, hub):
    secret = "hf_" + "b" * 24
    done = publish(hub, VARIANT, token=secret)
    assert done.returncode == 1
    assert "publication_refused: expected the Hub to take you/tiny" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert secret not in done.stdout + done.stderr
    assert list(hub.folder.iterdir()) == []
