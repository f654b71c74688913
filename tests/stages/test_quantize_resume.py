"""quantize: a killed run is continued at the block where it stopped, or started over."""

import shutil

import pytest

from quantline.paths import MODEL, QUANTIZED
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.recipes.refinement.state import RefinementState
from tests.helpers.injection import kill_after_calls
from tests.helpers.project import Project

pytestmark = pytest.mark.xdist_group("quantize")  # each recipe's result once for all


def files(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (QUANTIZED / name).iterdir()}


def quantized(name: str) -> QuantizedModel:
    return QuantizedModel(QUANTIZED / name)


def kill_after(project: Project, name: str, count: int) -> None:
    """Run the stage in a process that is killed when it has written `count` parts."""
    kill_after_calls(project.root, "quantize", name, QuantizedWriter, "close_part", count)


@pytest.mark.parametrize(
    ("name", "remaining"),
    [("awq-w4g128", ["block-001", "rest"]), ("q4_k_m", ["block-001", "rest"])],
)
def test_quantize_resumes_at_the_block_where_it_was_killed(
    calibrated_project, quantize_once, name, remaining, capsys, monkeypatch
):
    quantize_once(name)
    expected = files(name)
    shutil.rmtree(QUANTIZED)
    kill_after(calibrated_project, name, 1)
    assert not (QUANTIZED / name).exists()
    written = []
    close_part = QuantizedWriter.close_part

    def close_and_note(self, part, report):
        written.append(part)
        close_part(self, part, report)

    monkeypatch.setattr(QuantizedWriter, "close_part", close_and_note)
    calibrated_project.stage("quantize", name)
    assert "resumes where a killed run stopped" in capsys.readouterr().out
    assert written == remaining
    assert files(name) == expected
    assert [path.name for path in QUANTIZED.iterdir()] == [name]


def test_quantize_starts_over_when_something_changed(calibrated_project, capsys):
    name = "rtn-w4g128"
    choice = ["recipe=[none,rtn-w4g128]", "variant=[bf16]"]
    calibrated_project.compose(*choice)
    kill_after(calibrated_project, name, 1)
    calibrated_project.compose(*choice, "recipes.rtn-w4g128.bits=3")
    calibrated_project.stage("quantize", name)
    sentence = "starts over, because recipe changed since a run was killed"
    assert sentence in capsys.readouterr().out
    layers = quantized(name).report["layers"].values()
    assert {entry["bits"] for entry in layers} == {3}
    kill_after(calibrated_project, name, 1)
    (MODEL / "model.safetensors").touch()
    calibrated_project.stage("quantize", name)
    assert "because model changed since a run was killed" in capsys.readouterr().out


def test_quantize_resumes_at_the_step_of_refinement_where_it_was_killed(
    calibrated_project, capsys, monkeypatch
):
    name = "rtn-w4g128"
    refine = f"recipes.{name}.refine"
    calibrated_project.compose(
        f"recipe=[none,{name}]",
        "variant=[bf16]",
        *(f"recipes.{name}.bits=2", f"recipes.{name}.group_size=64"),
        *(f"{refine}.steps=3", f"{refine}.learning_rate=0.01"),
    )
    calibrated_project.stage("quantize", name)
    told = capsys.readouterr().out
    assert "3 steps of refinement" in told and "refine" in quantized(name).report
    expected = files(name)
    shutil.rmtree(QUANTIZED)
    # Two steps of two blocks and the last norm, and the norm of the third.
    root = calibrated_project.root
    kill_after_calls(root, "quantize", name, RefinementState, "write", 7)
    noted = []
    note = RefinementState.note

    def note_and_tell(self, **found):
        noted.extend(found)
        note(self, **found)

    monkeypatch.setattr(RefinementState, "note", note_and_tell)
    calibrated_project.stage("quantize", name)
    assert "resumes where a killed run stopped" in capsys.readouterr().out
    assert noted == ["steps", "kld_after", "report", "parts"]
    assert files(name) == expected
    assert [path.name for path in QUANTIZED.iterdir()] == [name]
