"""The named failure of a variant, from the run events."""

import pytest

from quantline.config.compose import compose
from quantline.config.validation import validate
from quantline.errors import Failure
from quantline.report.failures import last_failure, why_not_built
from quantline.run.stage_names import run_name
from tests.helpers.project import ROOT
from tests.helpers.report import event, write_events


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ([], None),
        ([event("export", "onnx-fp32", "smoke_failed")], None),
        ([event("export", "bf16", "smoke_failed")], "smoke_failed"),
        (
            [event("quantize", "none", "non_finite"), event("quantize", "other", "disk_full")],
            "non_finite",
        ),
        ([event("load", None, "missing_shard")], "missing_shard"),
        ([event("export", "bf16", "smoke_failed"), event("export", "bf16")], None),
        (
            [
                event("export", "bf16", "smoke_failed"),
                event("export", "bf16"),
                event("evaluate", "bf16", "runtime_crashed"),
            ],
            "runtime_crashed",
        ),
        (
            [
                event("load", None, "missing_shard"),
                event("export", "bf16", "smoke_failed"),
                event("load", None),
            ],
            "smoke_failed",
        ),
    ],
)
def test_last_failure_is_the_newest_that_was_not_mended(tmp_path, monkeypatch, events, failure):
    monkeypatch.chdir(tmp_path)
    write_events(*events)
    found = last_failure("bf16", "none")
    assert (found[0] if found else None) == failure


@pytest.mark.parametrize(("ended", "failure"), [(False, "killed"), (True, None)])
def test_last_failure_names_a_stage_that_never_said_how_it_ended(
    tmp_path, monkeypatch, ended, failure
):
    monkeypatch.chdir(tmp_path)
    started = event("evaluate", "bf16") | {"reason_code": "stage_started", "summary": "it started"}
    failed = event("evaluate", "bf16", "disk_full")
    write_events(failed, started, *([event("evaluate", "bf16")] if ended else []))
    found = last_failure("bf16", "none")
    assert (found[0] if found else None) == failure
    if found:
        assert found[1].startswith("it started, and it never said how it ended: it was killed")


def test_runs_with_other_parameters_say_nothing_of_the_present_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = validate(compose(["suite=quick"], ROOT))
    other = validate(compose(["suite=quick", "recipes.gptq-w4g128.bits=3"], ROOT))
    target = validate(compose(["suite=quick", "target=edge"], ROOT))
    names = ("gptq-w4g128", "gptq-w4g128")
    stage = ("export", "gptq-w4g128")
    failed = event(*stage, "smoke_failed") | {"run_id": run_name(*stage, params)}
    write_events(failed, event(*stage) | {"run_id": run_name(*stage, other)})  # as a queue does
    for present in (params, target):
        assert why_not_built(*names, present) == ("smoke_failed", "export: smoke_failed")
    write_events(failed)
    failure, message = why_not_built(*names, other)
    assert failure == Failure.MISSING_FILE
    assert message.startswith("it was not built with the present parameters; run `quantline repro`")
    assert "smoke_failed" in message
    write_events(event(*stage, "config_stale") | {"run_id": run_name(*stage, None)})
    assert why_not_built(*names, other)[0] == "config_stale"


def test_last_failure_has_the_events_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_events(event("export", "bf16", "smoke_failed"))
    assert last_failure("bf16", "none") == ("smoke_failed", "export: smoke_failed")


def test_last_failure_without_events_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert last_failure("bf16", "none") is None
