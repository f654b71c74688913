"""What a project's model is called where several projects meet, such as MLflow's model registry."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

DEMO = "demo"
FILES = (".gguf",)  # a model of one file is called by its stem
UNNAMED = "model"


def model_name(model: Mapping[str, Any]) -> str:
    """Return a name of letters, digits, dots, hyphens and underscores.

    It is the last part of the id on the Hub, or the name of the folder or file, with that of the
    adapter behind it.

    Args:
        model: The section of params.yaml; keys may be absent.
    """
    adapter = _last_part(model.get("adapter"))
    if model.get("source") == DEMO:
        base = DEMO
    else:
        base = _last_part(model.get("id")) or _last_part(model.get("path")) or UNNAMED
    return f"{base}-{adapter}" if adapter else base


def _last_part(path: str | None) -> str:
    """Return what a path or an id ends with; "" for none."""
    last = PurePosixPath(path or "")
    name = last.stem if last.suffix.lower() in FILES else last.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
