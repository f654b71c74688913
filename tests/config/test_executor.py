"""The section `executor`: what each kind takes."""

import pytest

from quantline.config.compose import compose
from quantline.config.executor import Executor
from quantline.config.params import Params
from quantline.config.validation import validate
from quantline.errors import ConfigError
from quantline.run.stage_names import run_name
from tests.helpers.project import ROOT


def executor(*overrides: str) -> Executor:
    return validate(compose(["suite=quick", *overrides], ROOT)).executor


def test_executor_takes_options_of_its_kind():
    assert executor() == Executor() and not executor().divides
    assert executor("executor.workers=2").divides
    ray = executor("executor=ray", "executor.workers=1", "executor.address=null")
    assert ray.divides and ray.address is None  # a worker of Ray is elsewhere
    slurm = executor("executor=slurm", "executor.sbatch={partition: gpu, nice: 3}")
    assert slurm.sbatch == {"partition": "gpu", "nice": 3}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["executor=local", "executor.minutes=3"], "executor local takes no minutes, found 3"),
        (["executor=ray", "executor.cluster=local"], "executor ray takes no cluster"),
        (["executor=slurm", "executor.address=auto"], "executor slurm takes no address"),
        (["executor=ray", "executor.threads=null"], "executor ray needs threads"),
        (["executor=slurm", "executor.minutes=null"], "executor slurm needs minutes"),
        (["executor.workers=0"], r"executor\.workers: .* greater than or equal to 1, found 0"),
        (["+executor.worker=2"], r"executor\.worker: unknown key \(did you mean workers\?\)"),
        (["executor.kind=dask"], r"executor\.kind: .*'local', 'ray' or 'slurm', found 'dask'"),
    ],
)
def test_executor_refuses_what_does_not_fit(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        executor(*overrides)


def test_run_name_does_not_depend_on_who_computes():
    params: Params = validate(compose(["suite=quick"], ROOT))
    other = params.model_copy(update={"executor": Executor(workers=3)})
    for stage, instance in (("quantize", "q4_k_m"), ("compare", None)):
        assert run_name(stage, instance, params) == run_name(stage, instance, other)
