"""What a project's model is called where several projects meet, such as MLflow's model registry."""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from quantline.config.params import Model

DEMO = "demo"
FILES = (".gguf",)  # a model of one file is called by its stem
UNNAMED = "model"


def model_name(model: Mapping[str, Any]) -> str:
    """Return a name of letters, digits, dots, hyphens and underscores, in any script.

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
    return re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip("-.")


def shown_name(model: Model) -> str:
    """Return what pages call a model: its id, or its path in the project.

    Of a path elsewhere it is the last part: where a machine has its models is nobody's business.
    """
    path = PurePosixPath(model.path or "")
    return model.id or str(path.name if path.is_absolute() else path)
