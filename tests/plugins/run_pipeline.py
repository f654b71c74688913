"""Run every stage on a model of a plugin's family, with a plugin's method, container and runtime.

python -m tests.plugins.run_pipeline PROJECT MODEL TEXTS     # the plugins are on PYTHONPATH
"""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.children import fork_children
from tests.helpers.models import write_model
from tests.helpers.project import Project, begin_project

BASE = """\
method: row-clip
bits: 4
group_size: 64
symmetric: false
scales: minmax
steps: 10
substitution: report
"""
RECIPE = """\
# @package recipes.row-clip
defaults: [_row-clip@_here_]
"""
VARIANT = """\
# @package variants.{name}
defaults: [_variant@_here_, _self_]

recipe: row-clip
{choice}
"""
CHOICES = {"dense": "format: dense", "bf16": "runtime: transformers-bf16"}
SUITE = """\
# @package _global_
defaults:
  - /recipe: [row-clip]
  - /variant: [dense, bf16]

suite: plugins
"""


def main(root: Path, texts: Path) -> None:
    """Make a project in an empty folder and run its stages."""
    model = write_model(root / "model", "arcee", hidden_act="relu2")
    begin_project(root)
    (root / "conf/recipe/_row-clip.yaml").write_text(BASE)
    (root / "conf/recipe/row-clip.yaml").write_text(RECIPE)
    for name, choice in CHOICES.items():
        text = VARIANT.format(name=name, choice=choice)
        (root / f"conf/variant/{name}.yaml").write_text(text)
    (root / "conf/suite/plugins.yaml").write_text(SUITE)
    os.chdir(root)
    project = Project(root, model, texts)
    project.compose(
        "suite=plugins",
        "target=any",
        "target.gates=[{metric: kld_above_tenth, operator: '<=', threshold: 1.0}]",
    )
    for stage in ("load", "calibrate", "reference"):
        project.stage(stage)
    project.stage("quantize", "row-clip")
    project.stage("export", "bf16")  # its process has to find the plugins too
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        project.stage("export", "dense")
        for variant in CHOICES:
            project.stage("evaluate", variant)
    project.stage("compare")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
