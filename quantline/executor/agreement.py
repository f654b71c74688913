"""Whether a worker, perhaps on another machine, sees what its stage sees."""

import os
import socket
from collections.abc import Mapping
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import sha256_json


def digests(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of each of the inputs that a result depends on."""
    return {name: sha256_json(value) for name, value in inputs.items()}


def check_agreement(wanted: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
    """Check that a worker's inputs are the stage's.

    Args:
        wanted: The stage's `digests`.
        inputs: What the worker found.

    Raises:
        StageError: artifact_changed.
    """
    found = digests(inputs)
    changed = sorted(name for name in found if found[name] != wanted.get(name))
    if changed:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected on {socket.gethostname()} the {', '.join(changed)} of the stage, found "
            f"others in {os.getcwd()}; give all machines the same project folder, the same "
            "packages and the same release of quantline",
        )
