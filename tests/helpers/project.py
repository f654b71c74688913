"""A project of its own on a tiny model, and the repository's root."""

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def begin_project(root: Path) -> Path:
    """Make a folder with the repository's conf/ and dvc.yaml, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "dvc.yaml", root)
    return root


def read_events(root: Path) -> list[dict[str, Any]]:
    """Return what events.jsonl of a project holds."""
    path = root / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def tiny_inputs(model: Path, texts: Path) -> list[str]:
    """Return the overrides that name a model and texts, and measure little."""
    return [
        "model=local",
        f"model.path={model}",
        "calibration=file",
        f"calibration.path={texts / 'calibration.txt'}",
        "calibration.part=[0.0,1.0]",
        "calibration.sequences=8",
        "calibration.length=64",
        "evaluation=file",
        f"evaluation.path={texts / 'evaluation.txt'}",
        "evaluation.part=[0.0,1.0]",
        "evaluation.sequences=4",
        "evaluation.length=64",
        f"evaluation.gold={texts / 'gold.jsonl'}",
        "evaluation.smoke_tokens=4",
        "evaluation.speed.prompt_tokens=8",
        "evaluation.speed.new_tokens=4",
        "evaluation.speed.repetitions=1",
    ]


class Conf:
    """The conf/ of a project; two that hold the same are equal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = sorted(path for path in (root / "conf").rglob("*") if path.is_file())
        self._content = tuple((str(path.relative_to(root)), path.read_bytes()) for path in files)

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conf) and self._content == other._content


@functools.cache
def composed(conf: Conf, overrides: tuple[str, ...]) -> str:
    """Return the text of params.yaml: Hydra takes a third of a second for what it has done."""
    from quantline.config.compose import as_yaml, compose

    return as_yaml(compose(overrides, root=conf.root))


class Project:
    """A project folder with the repository's conf/ and a params.yaml that names tiny things."""

    def __init__(self, root: Path, model: Path, texts: Path) -> None:
        self.root = root
        self.base = ["suite=quick", *tiny_inputs(model, texts)]

    def compose(self, *overrides: str) -> None:
        """Write params.yaml from conf/; later overrides win."""
        text = composed(Conf(self.root), (*self.base, *overrides))
        (self.root / "params.yaml").write_text(text)

    def stage(self, name: str, instance: str | None = None) -> Any:
        """Run a stage in this process. Raises SystemExit(1) if it fails, as a command would."""
        from quantline.run.stage import stage_run

        self._answer_before(name)
        module = importlib.import_module(f"stages.{name}")
        with stage_run(name, instance) as run:
            return getattr(module, name)(run)

    def command(
        self, name: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m stages.<name>` in a process of its own."""
        self._answer_before(name)
        return subprocess.run(
            [sys.executable, "-m", f"stages.{name}", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )

    def _answer_before(self, name: str) -> None:
        """Let the unquantized model answer the smoke prompts, which an export needs."""
        artifacts = self.root / "artifacts"
        is_loaded = (artifacts / "model/config.json").exists()
        if name == "export" and is_loaded and not (artifacts / "answers").exists():
            with contextlib.redirect_stdout(io.StringIO()):
                self.stage("answer")

    def events(self) -> list[dict[str, Any]]:
        """Return what events.jsonl holds."""
        return read_events(self.root)
