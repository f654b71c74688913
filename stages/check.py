"""Check all that the run is given, before anything is computed: every problem, in one list.

python -m stages.check     # params.yaml and the files that it names → artifacts/checked.json

`load` depends on what it writes, so that nothing is computed from inputs with a problem. It also
notices a params.yaml that is older than conf/ when every other stage is cached.
"""

from quantline.files import write_json
from quantline.paths import CHECKED
from quantline.run.stage import StageRun, stage_run


def check(run: StageRun) -> None:
    """Run the stage."""
    from quantline.inputs.check import check_inputs

    findings = check_inputs(run.params, run.warn)
    # The same whatever was checked: the stages after it depend on what they read themselves.
    write_json(CHECKED, {"checked": True})
    warnings = f", {len(findings.warnings)} warnings" if findings.warnings else ""
    run.set_summary(f"params.yaml is that of conf/, and the inputs fit together{warnings}")


if __name__ == "__main__":
    with stage_run("check") as run:
        check(run)
