"""Infinity in a configuration: transformers writes it as {"__float__": "Infinity"}.

JSON has no such number. State-space models have it as a bound, in a list of two.
"""

from typing import Any

TAG = "__float__"
VALUES = {"Infinity": float("inf"), "-Infinity": float("-inf")}
NAMES = {value: name for name, value in VALUES.items()}


def untagged(value: Any) -> Any:
    """Return a configuration with numbers in the place of what transformers writes for them."""
    if isinstance(value, dict):
        if set(value) == {TAG} and str(value[TAG]) in VALUES:
            return VALUES[str(value[TAG])]
        return {key: untagged(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [untagged(inner) for inner in value]
    return value


def tagged(value: Any) -> Any:
    """Return a configuration that JSON can hold; what `untagged` turns around."""
    if isinstance(value, dict):
        return {key: tagged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [tagged(inner) for inner in value]
    if isinstance(value, float) and value in NAMES:
        return {TAG: NAMES[value]}
    return value
