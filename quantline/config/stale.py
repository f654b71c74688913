"""Noticing that params.yaml has fallen behind conf/.

`dvc repro` does not compose, so an edit of conf/ would go unnoticed. params.yaml therefore carries
`conf_sha256`, the digest of the conf/ folder that it was composed from.
"""

from pathlib import Path
from typing import Any

from quantline.config.compose import MEND, compose, conf_digest
from quantline.config.params import Params
from quantline.config.validation import validate
from quantline.errors import ConfigError, StaleError

ABSENT = "absent"  # the value of a key that is not there
SHOWN = 3  # changes in a message


def check_fresh(params: Params, root: Path | None = None) -> None:
    """Raise StaleError if conf/ was edited after params.yaml was composed.

    Comparing values would call every override (`dvc exp run -S recipes.x.bits=3`) stale. The
    digest compares what params.yaml was composed from: an override leaves conf/ alone, an edit
    does not. DVC's own composition computes the digest too, through hydra_plugins/.
    """
    if params.conf_sha256 == conf_digest(root):
        return
    stale = "params.yaml is stale: conf/ was edited after it was composed"
    # The choices that params.yaml names are made again; as differences they would hide the edit.
    choices = [f"suite={params.suite}", f"target={params.target.name}"]
    try:
        changes = differences(params, validate(compose(choices, root)))
    except ConfigError as error:
        raise StaleError(f"{stale}, and now {error}") from error
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    shown = f" ({'; '.join(changes[:SHOWN])}{more})" if changes else ""
    raise StaleError(f"{stale}{shown}; {MEND}")


def differences(before: Params, after: Params) -> list[str]:
    """Return what changes from one set of parameters to another, as `key: old -> new`."""
    old = flatten(before.model_dump(mode="json", exclude={"conf_sha256"}))
    new = flatten(after.model_dump(mode="json", exclude={"conf_sha256"}))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was = old.get(key, ABSENT)
        becomes = new.get(key, ABSENT)
        if was != becomes:
            changes.append(f"{key}: {was!r} -> {becomes!r}")
    return changes


def flatten(values: dict[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return nested values by the path to each, such as `model.id`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, separator, path + separator)
        else:
            flat[path] = value
    return flat
