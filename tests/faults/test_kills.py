"""Every stage is killed, or gets an error, at every operation on a file, and run again.

After that the artifacts are those of an undisturbed run to the byte, nothing else is left, and no
block that was complete has been computed again. In between there is the old artifact or the new
one, whole.

By default a sample of the moments is tried; `make test-all` tries all, or, with their counts,

    python -m pytest -n 2 -rP -m slow tests/faults/test_kills.py
"""

import errno
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from quantline.causes import OF_ERRNO
from quantline.errors import Failure
from tests.helpers.injection import (
    Moment,
    Outcome,
    copy_of,
    files_of,
    import_everything,
    run_stage,
)
from tests.helpers.models import write_model
from tests.helpers.project import Project, begin_project

pytestmark = pytest.mark.xdist_group("kills")  # one project for all

# Stage, its instance, and where its result is; in the order in which they run.
STAGES = [
    ("load", None, "artifacts/model"),
    ("calibrate", None, "artifacts/calibration"),
    ("reference", None, "artifacts/reference"),
    ("answer", None, "artifacts/answers"),
    ("quantize", "int8", "artifacts/quantized/int8"),
    ("export", "int8", "artifacts/exports/int8"),
    ("evaluate", "int8", "metrics"),
    ("compare", None, "reports"),
]
IDS = [stage for stage, _, _ in STAGES]
FOLDERS = 6  # of these stages write one folder each
LIMITS = (1, 100, 1000, 3000, 10_000, 40_000)  # bytes at which a write is cut off
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE)
KILLS = 1  # of the moments of a stage that are tried by default
FAILING = 1
RESULTS = ("artifacts", "metrics", "reports")


@pytest.fixture(scope="module")
def projects(tmp_path_factory, texts) -> dict[str, Path]:
    """Stage → a project in which it has run once; "" → one in which none has."""
    folder = tmp_path_factory.mktemp("kills")
    model = write_model(
        folder / "source", hidden_size=64, intermediate_size=128, num_key_value_heads=4
    )
    root = begin_project(folder / "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        project = Project(root, model, texts)
        project.compose(
            "variant=[int8]",
            "recipe=[none,int8]",
            "calibration.sequences=2",
            "calibration.length=16",
            "evaluation.sequences=2",
            "evaluation.length=16",
        )
    import_everything()
    found = {"": root}
    before = root
    for stage, instance, _ in STAGES:
        after = folder / stage
        shutil.copytree(before, after, symlinks=True)
        outcome = run_stage(after, stage, instance, None)
        assert outcome.code == 0, outcome.words
        found[stage] = before = after
    return found


def moments_of(projects: dict[str, Path], stage: str) -> list[str]:
    """Return the operations of an undisturbed run that replaces an older result."""
    instance = next(instance for name, instance, _ in STAGES if name == stage)
    with copy_of(projects[stage], "counted") as root:
        outcome = run_stage(root, stage, instance, None)
    assert outcome.code == 0, outcome.words
    return outcome.operations


def sample(numbers: int, count: int) -> list[int]:
    """Return some numbers, spread evenly over all but the lock and the first event."""
    first = numbers // (2 * count)
    return [first + index * (numbers - 1 - first) // max(count - 1, 1) for index in range(count)]


def disturb(projects: dict[str, Path], stage: str, moment: Moment) -> Outcome:
    """Disturb a run of a stage, run it again, and hold that nothing of it can be seen."""
    position = IDS.index(stage)
    _, instance, result = STAGES[position]
    wanted = files_of(projects[stage])
    with copy_of(projects[stage], "disturbed") as root:
        # An older result, which differs.
        older = root / result / ("old" if stage in IDS[:FOLDERS] else "")
        if older.name == "old":
            older.write_text("of an older result")
        old = files_of(root, result)
        outcome = run_stage(root, stage, instance, moment)
        between = files_of(root, result)
        new = {name: digest for name, digest in wanted.items() if name.startswith(f"{result}/")}
        if stage in IDS[:FOLDERS]:
            assert between in (old, new), f"{moment}: {sorted(set(between) ^ set(old))}"
        again = run_stage(root, stage, instance, None)
        assert again.code == 0, f"{moment}: {outcome.words}\n{again.words}"
        found = files_of(root)
        assert found.keys() - wanted.keys() == set(), f"{moment} left something"
        assert found == wanted, f"{moment}: {[n for n in wanted if found.get(n) != wanted[n]]}"
    if outcome.code:  # else the second run had nothing to go on from
        total = len(set(outcome.parts) | set(again.parts))
        assert len(outcome.parts) + len(again.parts) <= total + 1, f"{moment} lost blocks"
    return outcome


def kill_at(projects: dict[str, Path], at: int, stage: str) -> None:
    outcome = disturb(projects, stage, Moment(at=at))
    assert outcome.code == -9, (at, outcome)


def cut_off(projects: dict[str, Path], largest: int, stage: str) -> None:
    outcome = disturb(projects, stage, Moment(largest=largest))
    assert outcome.code in (0, -25), (largest, outcome)


def fail_at(projects: dict[str, Path], at: int, error: int, stage: str) -> str:
    """Let an operation fail; return "named", or "harmless" where the stage can do without it."""
    outcome = disturb(projects, stage, Moment(at=at, error=error))
    if outcome.code == 0:
        return "harmless"
    assert outcome.code == 1, (at, outcome)
    assert f"({OF_ERRNO[error]})" in outcome.words, (at, outcome)
    return "named"


def fill_disk(projects: dict[str, Path], largest: int, stage: str) -> None:
    outcome = disturb(projects, stage, Moment(largest=largest, error=errno.EFBIG))
    if outcome.code:
        assert outcome.code == 1, (largest, outcome)
        assert f"({Failure.DISK_FULL})" in outcome.words, (largest, outcome)


@pytest.mark.parametrize("stage", IDS)
def test_a_stage_that_is_killed_at_an_operation_goes_on_to_the_same_bytes(projects, stage):
    for at in sample(len(moments_of(projects, stage)), KILLS):
        kill_at(projects, at, stage)


@pytest.mark.parametrize("stage", IDS)
def test_a_stage_that_is_killed_in_the_middle_of_a_file_goes_on_to_the_same_bytes(projects, stage):
    cut_off(projects, LIMITS[IDS.index(stage) % len(LIMITS)], stage)


@pytest.mark.parametrize("stage", IDS)
def test_an_operation_that_fails_is_named_and_leaves_the_old_result(projects, stage):
    moments = sample(len(moments_of(projects, stage)), FAILING)
    for number, at in enumerate(moments, IDS.index(stage)):
        fail_at(projects, at, ERRORS[number % len(ERRORS)], stage)


@pytest.mark.parametrize("stage", IDS)
def test_a_disk_that_fills_up_is_named_and_leaves_the_old_result(projects, stage):
    fill_disk(projects, LIMITS[-1 - IDS.index(stage) % len(LIMITS)], stage)


def attempt_all(stage: str, calls: Iterator[tuple[str, Callable[[], str | None]]]) -> None:
    """Try everything on a stage, and print how often which kind came out right."""
    counts: Counter[str] = Counter()
    wrong = []
    for kind, call in calls:
        try:
            counts[call() or kind] += 1
        except AssertionError as error:
            wrong.append((kind, str(error)))
    right = counts.total()
    print(f"{stage}: {right} of {right + len(wrong)} as they should be: {dict(counts)}")
    assert not wrong
    assert right > 30


@pytest.mark.slow
@pytest.mark.parametrize("stage", IDS)
def test_a_stage_is_killed_at_every_operation(projects, stage):
    def calls() -> Iterator[tuple[str, Callable[[], str | None]]]:
        for at in range(len(moments_of(projects, stage))):
            yield "killed at an operation", partial(kill_at, projects, at, stage)
        for largest in LIMITS:
            yield "killed within a write", partial(cut_off, projects, largest, stage)

    attempt_all(stage, calls())


@pytest.mark.slow
@pytest.mark.parametrize("stage", IDS)
def test_every_operation_of_a_stage_fails(projects, stage):
    def calls() -> Iterator[tuple[str, Callable[[], str | None]]]:
        for at in range(len(moments_of(projects, stage))):
            error = ERRORS[at % len(ERRORS)]
            yield "error", partial(fail_at, projects, at, error, stage)
        for largest in LIMITS:
            yield "full disk", partial(fill_disk, projects, largest, stage)

    attempt_all(stage, calls())
