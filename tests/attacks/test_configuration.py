"""Parameters, overrides, events and stores that were made to harm whoever reads them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from quantline.config.compose import as_yaml, compose, load_params
from quantline.config.tracking import Tracking
from quantline.metrics.results import ResultFiles
from quantline.paths import EVENTS, METRICS
from quantline.report.build import Report, collect_report
from quantline.report.failures import last_failure
from quantline.run.events import read_events
from quantline.tracking.undelivered import kept
from tests.helpers.attacks import HARMLESS, outcome
from tests.helpers.project import ROOT

SECRET = "Tr0ub4dor"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghij")
)
YAML = {
    "a command": "model: !!python/object/apply:os.system ['touch $MARK']",
    "an object": "model: !!python/object:os.stat_result {}",
    "a module": "model: !!python/module:os",
    "a name": "model: !!python/name:os.system",
    "a new object": "model: !!python/object/new:subprocess.Popen [['touch', 'x']]",
    "a bomb of aliases": BOMB,
    "a circle": "model: &a\n  path: *a",
    "a circle of lists": "recipes: &a [*a]",
    "brackets 2,000 deep": "a: " + "[" * 2000 + "]" * 2000,
    "a key that is a list": "? [a, b]\n: c",
    "a key that is a table": "? {a: b}\n: c",
    "two documents": "a: 1\n---\nb: 2",
    "no text": "\x00\x01\xff",
    "a list": "- 1",
    "nothing": "",
    "an integer of 10,000 digits": "seed: " + "9" * 10_000,
    "a date": "seed: 2026-11-26",
    "a merge of itself": "a: &a\n  <<: *a\n  b: 1",
    "control characters": 'suite: "\\e[2J\\u202e"',
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project without params.yaml."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "conf").symlink_to(ROOT / "conf")
    (root / "dvc.yaml").touch()
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("name", YAML)
def test_load_params_refuses(name, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(YAML[name].encode("latin-1"))
    assert outcome(lambda: load_params(path)) == "config_invalid"


OVERRIDES = {
    "a secret of the environment": "model.path=${oc.env:HF_TOKEN}",
    "a secret inside a text": "target.name='x ${oc.env:HF_TOKEN} y'",
    "a secret as the experiment": "tracking.experiment=${oc.env:HF_TOKEN}",
    "a secret by default": "model.path=${oc.env:GONE,${oc.env:HF_TOKEN}}",
    "a resolver that does not exist": "model.path=${evil:x}",
    "a circle of keys": "model.path=${model.path}",
    "code to make an object": "+model._target_=os.system",
    "a search path": "hydra.searchpath=[file:///etc]",
    "a folder to write to": "hydra.run.dir=../outside",
    "a group outside": "suite=../../outside/private",
    "a package outside": "+suite@a.b=default",
    "a store that is a file": "tracking.uri=file:/etc",
    "a store that is a vendor's": "tracking.uri=databricks://x",
    "a store that is a path": "tracking.uri=/etc/passwd",
    "a store of a plugin": "tracking.uri=evil+plugin://x",
    "a store with a password": "tracking.uri='mysql://a:Tr0ub4dor@db/x'",
    "a model's name with a path": "tracking.registry.name=../../x",
    "a recipe's name with a path": "+recipes.../x={method: none}",
    "a variant's name with HTML": "'+variants.<b>={recipe: none}'",
    "a number where there is none": "seed=nan",
    "a threshold of infinity": "target.gates=[{metric: mean_kld, operator: '<=', threshold: inf}]",
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_compose_refuses(name, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    said = []

    def act() -> None:
        try:
            compose([OVERRIDES[name]])
        except Exception as error:
            said.append(str(error))
            raise

    assert outcome(act) == "config_invalid"
    assert SECRET not in said[0] and said[0]


def test_events_are_read_past_whatever_stands_there(measured, monkeypatch):
    monkeypatch.chdir(measured)
    line = {"stage": "load", "severity": "error", "summary": "x", "reason_code": "y", "payload": {}}
    lines = [
        b"\x00\xff", b"[" * 100_000, b'{"stage": ' + b"9" * 10_000 + b"}", b"null", b"[]", b"{}",
        json.dumps(line | {"payload": []}).encode(), json.dumps(line | {"stage": 7}).encode(),
        json.dumps(line | {"payload": {"instance": {}, "failure": []}}).encode(),
        json.dumps(line)[:20].encode(), b'"\\ud800"',
    ]  # fmt: skip
    EVENTS.write_bytes(b"\n".join(lines))
    assert outcome(lambda: read_events(EVENTS)) == HARMLESS
    assert outcome(lambda: last_failure("bf16", "none")) == HARMLESS
    assert outcome(lambda: collect_report(load_params())) == HARMLESS
    EVENTS.unlink()


FIGURES = {
    "nothing": "",
    "a list": "[]",
    "brackets 100,000 deep": "[" * 100_000,
    "half an object": '{"mean_kld": 0.',
    "texts as figures": '{"mean_kld": "<script>", "artifact_sha256": 7}',
    "an integer of 10,000 digits": '{"mean_kld": ' + "9" * 10_000 + "}",
    "NaN": '{"mean_kld": NaN}',
    "no text": "\x00\x01",
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A project with the figures of one variant, for all tests."""
    from tests.helpers.report import write_measured

    root = tmp_path_factory.mktemp("measured")
    (root / "conf").symlink_to(ROOT / "conf")
    (root / "dvc.yaml").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        values = compose(["suite=default", "variant=[gguf-q8_0]", "recipe=[q8_0]"])
        (root / "params.yaml").write_text(as_yaml(values))
        write_measured("gguf-q8_0", 5, 0.001)
    return root


@pytest.mark.parametrize("name", FIGURES)
def test_report_names_figures_that_are(name, measured, monkeypatch):
    monkeypatch.chdir(measured)
    files = (ResultFiles.of(METRICS, "gguf-q8_0").quality, METRICS / "lineage/gguf-q8_0.json")
    for path in files:
        before = path.read_text()
        path.write_text(FIGURES[name])
        reports: list[Report] = []
        assert outcome(lambda seen=reports: seen.append(collect_report(load_params()))) == HARMLESS
        (row,) = reports[0].variants
        assert not row.is_measured and row.failure != "internal_error"
        assert reports[0].pick is None
        path.write_text(before)


UNDELIVERED = {
    "a path outside": {"files": ["../../../outside/private.txt"]},
    "a path from the root": {"files": ["/etc/passwd"]},
    "files that are numbers": {"files": [7]},
    "no files": {"files": None},
    "a dataset that is none": {"datasets": [{"evil": 1}]},
    "another key": {"evil": 1},
}


@pytest.mark.parametrize("name", UNDELIVERED)
def test_kept_runs_take_no_file_from(name, folder):
    kept_run = folder / ".quantline/undelivered/1-a"
    kept_run.mkdir(parents=True)
    run = {"key": "a", "name": "a", "files": [], "datasets": []} | UNDELIVERED[name]
    (kept_run / "run.json").write_text(json.dumps(run))
    runs = []
    assert outcome(lambda: runs.extend(kept())) == HARMLESS
    assert runs == []


STORES = ["sqlite:///", "sqlite:///../outside/private.txt", "http://", "http://a b"]


@pytest.mark.parametrize("uri", STORES)
def test_a_store_that_is_none_costs_no_work(folder, uri):
    from quantline.tracking.undelivered import Run, log_or_keep

    outcomes = []
    tracking = Tracking(uri=uri, experiment="x")
    assert outcome(lambda: outcomes.append(log_or_keep(tracking, Run("a", "a")))) == HARMLESS
    assert outcomes[0].run_id or outcomes[0].error
