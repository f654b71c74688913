"""A calibration that is killed at the steps of its work that leave something behind."""

import contextlib
from pathlib import Path

import pytest

from quantline.calibration.calibrate import CalibrationRun
from quantline.config.texts import Calibration
from quantline.model.checkpoint import Checkpoint


class Killed(BaseException):
    """Stands in for a kill, after which no code of the library may tidy up."""


@pytest.fixture
def run(tiny_narrow, texts) -> CalibrationRun:
    path = str(texts / "calibration.txt")
    text = Calibration(source="file", path=path, watch=path, sequences=4, length=32)
    return CalibrationRun(Checkpoint(tiny_narrow), text, 0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("number", range(9))
def test_collect_after_a_kill_has_the_same_result(run, tmp_path, number):
    complete = tmp_path / "complete"
    complete.mkdir()
    info = run.collect(complete)
    killed = tmp_path / "killed"
    killed.mkdir()
    unlink = Path.unlink
    done = []

    def unlink_or_end(path: Path, missing_ok: bool = False) -> None:
        if len(done) == number:
            raise Killed
        done.append(path)
        unlink(path, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_or_end)
        with contextlib.suppress(Killed):
            run.collect(killed)
    assert run.collect(killed) == info
    assert files_of(killed) == files_of(complete)
