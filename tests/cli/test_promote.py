"""`quantline promote`: who becomes champion, and who does not."""

from pathlib import Path

import pytest

from tests.helpers.command_line import quantline
from tests.helpers.project import Project
from tests.helpers.report import DECIDED, write_measured, write_pick, write_truth

CHOICE = ["suite=default", "variant=[bf16,gguf-q8_0]", "recipe=[none,q8_0]"]
NAME = "quantline-model-laptop-cpu"
OTHER_BYTES = "cd" * 32


@pytest.fixture
def measured(project) -> Project:
    """A project with bf16, and with gguf-q8_0, which is the pick."""
    project.compose(*CHOICE)
    write_pick()
    return project


def champion() -> dict[str, str]:
    """Return number, hash and description of the version that has the alias."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")
    version = client.get_model_version_by_alias(NAME, "champion")
    return {
        "number": str(version.version),
        "sha256": version.tags["artifact_sha256"],
        "description": version.description,
    }


def test_promote_registers_the_pick_and_keeps_it_from_a_worse_one(measured):
    answer = quantline("promote")
    assert answer.exit_code == 0, answer.output
    assert f"gguf-q8_0 is {NAME} version 1, champion" in answer.output
    assert (
        "smallest" in champion()["description"] or "no other variant" in (champion()["description"])
    )
    assert quantline("promote").output.strip().endswith("champion, as before")

    write_measured("gguf-q8_0", 6, 0.001, OTHER_BYTES, **DECIDED)
    answer = quantline("promote")
    assert answer.exit_code == 1
    assert "promotion_refused: champion of" in answer.output
    assert "worse than version 1" in answer.output
    assert champion()["sha256"] == "ab" * 32
    line = measured.events()[-1]
    assert (line["reason_code"], line["severity"]) == ("model_not_registered", "warning")
    assert line["payload"]["failure"] == "promotion_refused"

    answer = quantline("promote", "--force")
    assert answer.exit_code == 0, answer.output
    assert "version 2, champion in place of version 1" in answer.output
    assert champion()["sha256"] == OTHER_BYTES
    assert measured.events()[-1]["payload"]["force"] is True


def test_promote_takes_no_variant_that_misses_the_target_or_whose_gate_cannot_tell(measured):
    write_truth()
    answer = quantline("promote", "bf16", "--force")
    assert answer.exit_code == 1
    assert "bf16 does not meet the target laptop-cpu" in answer.output
    write_measured("gguf-q8_0", 5, 0.001)  # on a hundred questions
    answer = quantline("promote", "--force")
    assert answer.exit_code == 1
    assert "a required gate of the target laptop-cpu does not pass" in answer.output
    assert "it cannot tell" in answer.output
    answer = quantline("promote", "nothing")
    assert answer.exit_code == 1
    assert "expected a variant among bf16, gguf-q8_0, found nothing" in answer.output
    measured.compose(*CHOICE, "tracking.registry=null")
    answer = quantline("promote")
    assert answer.exit_code == 1 and "found tracking.registry=null" in answer.output


def test_compare_leaves_promotion_to_people(measured, capsys):
    write_measured("gguf-q8_0", 5, 0.001, **DECIDED)
    measured.stage("compare")
    assert "not promoted: `quantline promote` does that" in capsys.readouterr().out
    line = [line for line in measured.events() if line["reason_code"] == "model_not_registered"][-1]
    assert line["severity"] == "info"
