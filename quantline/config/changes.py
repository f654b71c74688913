"""What another composition changes, in as few lines as say it.

Of recipes and variants that come or go, the names are enough.
"""

from collections.abc import Mapping
from typing import Any

from quantline.config.params import Params
from quantline.config.stale import ABSENT, flatten
from quantline.config.validation import NAMED

MOST = 24  # lines; who changes more than that has another project
NAMES = 12  # in a line
DERIVED = ("watch", "adapter_watch", "gold_watch")  # follow from the paths beside them


def summary(before: Params, after: Params) -> list[str]:
    """Return what changes from one set of parameters to another, a sentence for each line.

    Options are told as `key: old -> new`, recipes and variants that come or go by their names.
    """
    old = before.model_dump(mode="json", exclude={"conf_sha256"})
    new = after.model_dump(mode="json", exclude={"conf_sha256"})
    lines = []
    if old["suite"] != new["suite"]:
        lines.append(f"suite: {old.pop('suite')} -> {new.pop('suite')}")
    for section in NAMED:
        gone = [name for name in old[section] if name not in new[section]]
        come = [name for name in new[section] if name not in old[section]]
        for word, names, values in (("without", gone, old), ("with", come, new)):
            if names:
                rest = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
                lines.append(f"{section}: {word} {', '.join(names[:NAMES])}{rest}")
            for name in names:
                del values[section][name]
    options = _options(old, new)
    more = len(options) - MOST
    return [*lines, *options[:MOST], *([f"and {more} more options"] if more > 0 else [])]


def _options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for each option that differs."""
    was = _flat(old)
    becomes = _flat(new)
    return [
        f"{key}: {was.get(key, ABSENT)!r} -> {becomes.get(key, ABSENT)!r}"
        for key in sorted(was.keys() | becomes.keys())
        # Where null becomes a section, its options say so.
        if was.get(key) != becomes.get(key) and key.rpartition(".")[2] not in DERIVED
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values by their paths, those in lists of sections by their number."""
    return flatten({key: _numbered(value) for key, value in values.items()})


def _numbered(value: Any) -> Any:
    """Return a value in which lists of sections are sections, by number."""
    if isinstance(value, dict):
        return {key: _numbered(entry) for key, entry in value.items()}
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return {str(number): _numbered(entry) for number, entry in enumerate(value)}
    return value
