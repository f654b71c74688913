"""A model whose source is not on this machine, while dvc.lock says what `load` made of it.

A colleague who has pulled all results needs the source for nothing that is up to date.
"""

from pathlib import Path
from typing import Any

import yaml

from quantline.config.params import Params

LOCK = Path("dvc.lock")


def is_model_elsewhere(params: Params, root: Path) -> bool:
    """Whether the model's folder or adapter is not here, and `load` ran on the present section.

    Args:
        params: Of the project.
        root: The project's, with dvc.lock.
    """
    model = params.model
    paths = [path for path in (model.path, model.adapter) if path]
    if model.source == "hub" or all((root / path).exists() for path in paths):
        return False
    return _locked_model(root / LOCK) == model.model_dump(mode="json")


def _locked_model(lock: Path) -> Any:
    """Return the section `model` that `load` ran on last, by dvc.lock; None if it did not run."""
    try:
        locked = yaml.safe_load(lock.read_text(encoding="utf-8"))
        return locked["stages"]["load"]["params"]["params.yaml"]["model"]
    except (FileNotFoundError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
