"""`quantline gate` passes no figure that is not of the present parameters, files and bytes.

One thing of a finished project is changed at a time, and the gate has to fail unless that thing
provably has nothing to do with the figures. The changes of each file that are tried in every run
are drawn by its name; all of them are tried in `make test-all`.
"""

import random
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from quantline.config.compose import as_yaml, load_params
from quantline.config.stale import flatten
from quantline.report.chain import stale_links
from tests.helpers.changes import (
    Change,
    applied,
    byte_changes,
    changed,
    leaf_changes,
    swapped,
    with_another,
)
from tests.helpers.command_line import quantline
from tests.report.conftest import IMPORTANCE, RECIPES, VARIANTS

pytestmark = pytest.mark.xdist_group("chain")  # one measured project for all

RECIPE_OF = dict(zip(VARIANTS, RECIPES, strict=True))
# Files that no figure comes from, and why.
IRRELEVANT_FILES = {
    "events.jsonl": "says what happened; a figure that is there was measured",
    "mlflow.db": "a copy of what is in metrics/",
    "mlartifacts/*": "a copy of what is in metrics/",
    "reports/*": "gate makes the comparison anew",
    "dvc.yaml": "says what DVC runs again; the lineage says what a figure comes from",
    ".quantline/*": "who holds the lock",
    "metrics/summary/*": "what DVC's tables show of metrics/",
}
# Parameters that no figure comes from, and why.
IRRELEVANT_PARAMS = {
    "suite": "a name for what the other parameters say",
    "target.*": "what is asked of the figures: gate asks it anew",
    "tracking.*": "where runs are logged",
    "evaluation.limits.*": "when a process is stopped; a figure that is there was measured",
    "limits.*": "the same for stages",
    "executor.*": "who computes: the bytes are the same",
    "*watch": "what makes DVC run a stage again; the path itself is a parameter too",
}
BYTE_CHANGES = 1  # of each file in every run
LEAF_CHANGES = 1  # of each JSON file in every run


@pytest.fixture(scope="module")
def root(measured, tmp_path_factory) -> Iterator[Path]:
    """A copy of the project, as the working folder."""
    folder = tmp_path_factory.mktemp("gate") / "project"
    shutil.copytree(measured, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def drawn(changes: Iterator[Change], count: int | None) -> list[Change]:
    """Return some of a file's changes, the same in every run; all of them without a count."""
    all_changes = list(changes)
    if count is None or len(all_changes) <= count:
        return all_changes
    return random.Random(str(all_changes[0].path)).sample(all_changes, count)


def matches(name: str, patterns: dict[str, str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def belongs_to(path: Path) -> tuple[str, ...]:
    """Return the variants whose figures a file has led to."""
    name = str(path)
    if name == IMPORTANCE:
        return VARIANTS[1:]
    for variant, recipe in RECIPE_OF.items():
        if variant in name or f"/{recipe}/" in name:
            return (variant,)
    return VARIANTS


def twin(path: Path) -> Path | None:
    """Return the same file of the other variant or recipe, if there is one."""
    name = str(path)
    for own, other in ((VARIANTS, VARIANTS[::-1]), (RECIPES, RECIPES[::-1])):
        for before, after in zip(own, other, strict=True):
            if before in name and Path(name.replace(before, after)).is_file():
                return Path(name.replace(before, after))
    return None


def project_files() -> list[Path]:
    """Return the files that figures come from, besides conf/ and params.yaml."""
    paths = sorted(path for path in Path().rglob("*") if path.is_file())
    apart = IRRELEVANT_FILES | {"conf/*": "", "params.yaml": ""}
    return [path for path in paths if not matches(str(path), apart)]


def passes(variant: str) -> bool:
    """Whether the gate passes a variant; a failure is said in words."""
    done = quantline("gate", variant)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 1)
    assert done.output.strip()
    return done.exit_code == 0


def what_passes(changes: list[Change], aside: Path) -> list[str]:
    """Return the changes after which the gate passes a variant that they have to do with."""
    passed = []
    for change in changes:
        with applied(change, aside):
            for variant in belongs_to(change.path)[:1]:
                if passes(variant):
                    passed.append(f"{change} ({variant})")
    assert passes(VARIANTS[0])
    assert passes(VARIANTS[1])
    return passed


def check_files(root: Path, most_bytes: int | None, most_leaves: int | None) -> int:
    """Change every file; return how many changes were tried."""
    changes = []
    for path in project_files():
        changes += drawn(byte_changes(path, twin(path)), most_bytes)
        if path.suffix == ".json":
            changes += drawn(leaf_changes(path), most_leaves)
    passed = what_passes(changes, root / ".aside")
    print(f"{len(changes) - len(passed)} of {len(changes)} changes of files were noticed")
    assert passed == []
    return len(changes)


def test_gate_fails_after_a_change_of_any_file(root, record_property):
    tried = check_files(root, BYTE_CHANGES, LEAF_CHANGES)
    record_property("changes", tried)
    assert tried > 100


@pytest.mark.slow
def test_gate_fails_after_every_change_of_every_file(root, record_property):
    tried = check_files(root, None, None)
    record_property("changes", tried)
    assert tried > 1000


def test_gate_fails_after_a_change_of_each_value_that_figures_hang_together_by(root):
    changes = list(leaf_changes(Path(f"metrics/lineage/{VARIANTS[0]}.json")))
    assert what_passes(changes, root / ".aside") == []


def test_gate_fails_after_files_of_two_variants_have_traded_places(root):
    pairs = [(path, twin(path)) for path in project_files()]
    pairs += [(Path("artifacts/exports") / VARIANTS[0], Path("artifacts/exports") / VARIANTS[1])]
    passed = []
    tried = 0
    for first, second in pairs:
        if second is None or first >= second:
            continue
        if first.is_file() and first.read_bytes() == second.read_bytes():
            continue
        tried += 1
        with swapped(first, second):
            passed += [f"{first} ({name})" for name in VARIANTS if passes(name)]
    assert passed == []
    assert tried > 10


# Where a new file would be read by a stage that ran today, or was written by none.
ADDED = (
    *(f"mine/model/{name}" for name in ("special_tokens_map.json", "added_tokens.json")),
    "mine/model/model.safetensors.index.json",
    "artifacts/model/special_tokens_map.json",
    "artifacts/model/model-00001-of-00002.safetensors",
    "artifacts/calibration/inputs-002.safetensors",
    "artifacts/reference/more.json",
    "artifacts/quantized/q4_k_m/block-002.safetensors",
    f"artifacts/exports/{VARIANTS[0]}/adapter.gguf",
    f"artifacts/exports/{VARIANTS[0]}/sub/config.json",
    "conf/target/new.yaml",
)


@pytest.mark.parametrize("name", ADDED)
def test_gate_fails_after_a_file_was_added(root, name):
    assert what_passes([Change(Path(name), "added", lambda data: b"{}")], root / ".aside") == []


def test_gate_fails_after_a_change_of_conf(root):
    paths = sorted(path for path in Path("conf").rglob("*.yaml"))
    changes = []
    for path in paths:
        changes += drawn(byte_changes(path), 1)
    assert what_passes(random.Random(0).sample(changes, 4), root / ".aside") == []


def test_gate_fails_after_a_change_of_params_yaml_as_a_file(root):
    def broken(what: str, data: bytes | None) -> Change:
        return Change(Path("params.yaml"), what, lambda before: data)

    whole = Path("params.yaml").read_bytes()
    changes = [
        broken("removed", None),
        broken("emptied", b""),
        broken("a list", b"[1, 2]\n"),
        broken("truncated", whole[: len(whole) // 2]),
        broken("no text", b"\xff\xfe\x00"),
    ]
    assert what_passes(changes, root / ".aside") == []


def test_gate_fails_after_a_change_of_each_parameter(root):
    values = yaml.safe_load(Path("params.yaml").read_text())
    others = set(VARIANTS[1:]) | set(RECIPES[1:])
    changes = []
    for key in flatten(values):
        if matches(key, IRRELEVANT_PARAMS) or others & set(key.split(".")):
            continue
        params = changed(values, key)
        if params is None:
            new = with_another(values, key, "other")
        else:
            new = params.model_dump(mode="json")
        text = as_yaml(new).encode()
        changes.append(Change(Path("params.yaml"), key, lambda data, text=text: text))
    assert what_passes(changes, root / ".aside") == []
    assert len(changes) >= 50


def test_parameters_that_no_figure_comes_from_leave_figures_alone(root):
    values = yaml.safe_load(Path("params.yaml").read_text())
    for key in flatten(values):
        others = set(VARIANTS[1:]) | set(RECIPES[1:])
        if matches(key, IRRELEVANT_PARAMS) or others & set(key.split(".")):
            params = changed(values, key)
            if params is not None:
                assert stale_links(VARIANTS[0], params) == [], key
    assert stale_links(VARIANTS[0], load_params()) == []
