"""Workers of Ray and of Slurm, where their packages are installed; and what is said where not."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from quantline.config.executor import Executor
from quantline.errors import Failure, StageError
from quantline.executor.item import FUNCTIONS, Item
from quantline.executor.run_items import run_items
from quantline.files import read_json
from tests.helpers.project import ROOT
from tests.helpers.slurm import write_slurm

RAY = Executor(kind="ray", threads=1, workers=2)
SLURM = Executor(kind="slurm", threads=1, workers=2, minutes=5, cluster="local")


def squares_of(executor: Executor, folder: Path, count: int = 4) -> dict[int, int]:
    """Have workers make squares; return number → square."""
    taken = {}

    def take(item: Item, made: Path) -> None:
        taken[item.arguments["number"]] = read_json(made / "square.json")["square"]
        os.rename(made, folder / str(item.arguments["number"]))

    items = [Item(f"number {n}", "square", {"number": n}) for n in range(count)]
    run_items(executor, items, folder, take, "squares", "number")
    return taken


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> None:
    """Workers are processes of their own, so they are told of `square` when they start."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from quantline.executor.item import FUNCTIONS\n"
        f"FUNCTIONS['square'] = {FUNCTIONS['square']!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))


@pytest.mark.parametrize(
    ("executor", "package", "extra"),
    [(RAY, "ray", "quantline[ray]"), (SLURM, "submitit", "quantline[slurm]")],
)
def test_executors_say_how_to_install_their_package(
    tmp_path, monkeypatch, executor, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StageError, match=r"expected .* and cannot import it") as caught:
        squares_of(executor, tmp_path)
    assert caught.value.failure is Failure.RUNTIME_UNAVAILABLE
    assert f"pip install '{extra}'" in str(caught.value)


def test_slurm_says_so_where_there_is_none(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    executor = SLURM.model_copy(update={"cluster": "slurm"})
    with pytest.raises(StageError, match="expected Slurm on this machine") as caught:
        squares_of(executor, tmp_path)
    assert caught.value.failure is Failure.RUNTIME_UNAVAILABLE


@pytest.mark.slow
def test_slurm_does_items_in_jobs_of_this_machine(tmp_path, plugin):
    pytest.importorskip("submitit")
    assert squares_of(SLURM, tmp_path) == {n: n**2 for n in range(4)}
    assert not (tmp_path / "items").exists()


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder of Slurm's commands, which are found first."""
    folder = tmp_path / "slurm"
    write_slurm(folder)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
    return folder


@pytest.mark.slow
def test_slurm_submits_jobs_that_ask_for_what_they_need(tmp_path, plugin, slurm):
    pytest.importorskip("submitit")
    what = {"cluster": "slurm", "sbatch": {"partition": "gpu"}, "memory_mib": 2048}
    made = tmp_path / "made"
    made.mkdir()
    executor = SLURM.model_copy(update=what)
    assert squares_of(executor, made) == {n: n**2 for n in range(4)}
    jobs = [json.loads(path.read_text()) for path in sorted((slurm / "jobs").glob("*.json"))]
    assert len(jobs) == executor.workers
    for job in jobs:
        lines = set(job["text"].splitlines())
        wanted = ("partition=gpu", "cpus-per-task=1", "mem=2GB", "time=5", "job-name=quantline")
        assert {f"#SBATCH --{option}" for option in wanted} <= lines
        assert job["State"] in ("COMPLETED", "CANCELLED")


@pytest.mark.slow
def test_ray_does_items_in_tasks_that_it_starts_here(tmp_path, plugin):
    pytest.importorskip("ray")
    assert squares_of(RAY, tmp_path) == {n: n**2 for n in range(4)}


@pytest.mark.slow
def test_ray_refuses_workers_for_which_no_machine_has_room(tmp_path, plugin):
    pytest.importorskip("ray")
    with pytest.raises(StageError, match=r"room for a worker of .*'num_gpus': 9") as caught:
        squares_of(RAY.model_copy(update={"gpus": 9}), tmp_path)
    assert caught.value.failure is Failure.CONFIG_INVALID


@pytest.mark.slow
def test_ray_says_so_where_no_cluster_answers(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(StageError, match=r"expected a Ray cluster at auto") as caught:
        squares_of(RAY.model_copy(update={"address": "auto"}), tmp_path)
    assert caught.value.failure is Failure.RUNTIME_UNAVAILABLE


@pytest.mark.slow
def test_ray_goes_on_when_a_node_is_killed_in_the_middle(tmp_path, monkeypatch):
    """Two nodes on this machine, each with room for one worker."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    site, marks, made = (tmp_path / name for name in ("site", "marks", "made"))
    for folder in (site, marks, made):
        folder.mkdir()
    (site / "sitecustomize.py").write_text(
        "from quantline.executor.item import FUNCTIONS\n"
        "FUNCTIONS['square_on_ray'] = ('tests.helpers.squares', 'square_on_ray')\n"
    )
    monkeypatch.setitem(FUNCTIONS, "square_on_ray", ("tests.helpers.squares", "square_on_ray"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    over = threading.Event()
    try:
        second = cluster.add_node(num_cpus=1)

        def kill_in_the_middle() -> None:
            while not list(marks.glob(f"*-{second.node_id}")):
                if over.wait(0.05):
                    return
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        items = []
        for number in range(6):
            arguments = {"number": number, "marks": str(marks), "seconds": 2.0}
            items.append(Item(f"number {number}", "square_on_ray", arguments))
        executor = RAY.model_copy(update={"address": cluster.address})
        found = {}

        def take(item: Item, folder: Path) -> None:
            found[item.arguments["number"]] = read_json(folder / "square.json")["square"]
            os.rename(folder, made / str(item.arguments["number"]))

        run_items(executor, items, tmp_path / "stage", take, "squares", "number")
        over.set()
        killer.join()
    finally:
        over.set()
        cluster.shutdown()
    assert found == {number: number**2 for number in range(6)}
    (lost,) = marks.glob(f"*-{second.node_id}")
    assert len(list(marks.glob(f"{lost.name.partition('-')[0]}-*"))) == 2  # done again elsewhere
