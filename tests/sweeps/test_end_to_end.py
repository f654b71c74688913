"""`quantline sweep` with the real DVC: two experiments at once, on a model that is not the demo."""

import csv
import io
import json
import sqlite3
from contextlib import closing

import pytest

from tests.helpers.clone import Clone
from tests.helpers.project import tiny_inputs
from tests.helpers.sweeps import git

SWEPT = ["recipes.gptq.bits=3,4", "--jobs", "2"]
OVERRIDES = ["recipe=[none,gptq-w4g128]", "variant=[gptq-w4g128]", "target=any"]


@pytest.mark.slow
@pytest.mark.e2e
def test_two_experiments_at_once_measure_the_projects_own_model(tmp_path, tiny_model, texts):
    """From a fresh clone, without a database of MLflow, which both would want to make."""
    overrides = [*OVERRIDES, *tiny_inputs(tiny_model, texts), "evaluation.speed.threads=1"]
    clone = Clone.begin(tmp_path, [*overrides, *SWEPT])
    (tmp_path / "conf/suite/mine.yaml").write_text("# A file that git does not have.\n")
    clone.quantline("sweep")
    report = json.loads((tmp_path / "reports/sweeps/gptq-bits.json").read_text())
    rows = {row["variant"]: row for row in report["variants"]}
    assert set(rows) == {"gptq-bits3", "gptq-bits4"}
    assert all(row["status"] == "ok" for row in rows.values())
    sizes = [rows[name]["metrics"]["size_bytes"] for name in ("gptq-bits3", "gptq-bits4")]
    assert sizes[0] < sizes[1]
    for row in rows.values():
        params = git(tmp_path, "show", f"{row['rev']}:params.yaml")
        assert f"path: {tiny_model}\n" in params
    stages = [stage for stage, _ in clone.finished()]
    assert stages.count("calibrate") == stages.count("reference") == 1
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        tags = database.execute("select value from tags where key = 'stage'").fetchall()
    names = [tag for (tag,) in tags]
    assert names.count("sweep") == 1
    assert names.count("experiment") == 2
    assert names.count("evaluate") == 2
    shown = clone.dvc("exp", "show", "--csv", "--no-pager")
    table = list(csv.DictReader(io.StringIO(shown)))
    assert {row["Experiment"] for row in table} >= {"gptq-bits3", "gptq-bits4"}
    columns = [name for name in table[0] if name in ("MiB", "KLD", "gold %", "tok/s")]
    assert len(columns) == 4
    assert "as before" in clone.quantline("sweep")
    assert [stage for stage, _ in clone.finished()].count("evaluate") == 2
