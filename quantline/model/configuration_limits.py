"""How large the numbers of a config.json may be, so that none of them exhausts memory or time.

They are looked at before transformers sees them: its configuration classes make lists with an entry
for each layer or label. The bounds are far above any model that there is.
"""

import re
from typing import Any

from quantline.errors import Failure, StageError

# Words in a key → the largest number that it may have; the first that fits counts. A key with none
# of them is free: people note there what they like, such as how many tokens a model has seen.
LIMITS = (
    (re.compile(r"num_labels"), 1 << 16),
    (re.compile(r"vocab"), 1 << 24),
    (re.compile(r"head_dim|head_size"), 1 << 16),
    (re.compile(r"head"), 1 << 14),
    (re.compile(r"^(?:num|n)_.*expert"), 1 << 14),
    (re.compile(r"^(?:num|n)_.*layer|num_blocks|n_blocks|depth"), 1 << 10),
    (re.compile(r"hidden_size|n_embd|d_model"), 1 << 20),
    (re.compile(r"position"), 1 << 24),
    (
        re.compile(r"size|dim|window|chunk|inner|layer|expert|group|rank|theta|factor"),
        (1 << 31) - 1,
    ),
)
MOST_EXPERTS = 1 << 17  # of all layers together


def check_numbers(config: dict[str, Any], prefix: str = "") -> None:
    """Refuse absurd numbers.

    Raises:
        StageError: unsupported_architecture, naming the key.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_numbers(value, f"{prefix}{key}.")
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            limit = _limit(key)
            if limit is not None and not abs(number) <= limit:
                raise _too_large(f"{prefix}{key}", limit, number)
    layers = _largest(config, "layer")
    experts = _largest(config, "expert")
    if layers * experts > MOST_EXPERTS:
        raise _too_large(f"{prefix}num_experts of all layers", MOST_EXPERTS, layers * experts)


def _limit(key: str) -> int | None:
    for words, limit in LIMITS:
        if words.search(key):
            return limit
    return None


def _largest(config: dict[str, Any], word: str) -> int:
    """Return the largest count of something; 1 if there is none."""
    largest = 1
    for key, value in config.items():
        is_count = key.startswith(("num_", "n_")) and word in key and "per_tok" not in key
        if is_count and isinstance(value, int):
            largest = max(largest, value)
    return largest


def _too_large(key: str, limit: int, found: float) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected at most {limit} for {key} in config.json, found {found}; take the config.json "
        "that the weights were saved with",
    )
