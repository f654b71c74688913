"""How many tokens a model takes: a limit where positions are learned, a mark where they rotate."""

from collections.abc import Mapping

from quantline.errors import Failure, Reason, StageError
from quantline.model.architecture import Architecture

SHOWN = 10  # items in one message


def learned_positions(arch: Architecture) -> int | None:
    """Return how many positions a model has learned; None if it computes them."""
    if arch.structure:
        return arch.structure.positions
    return arch.max_positions if "position_embd" in arch.family.outside else None


def check_length(arch: Architecture, key: str, length: int) -> str | None:
    """Check a length of params.yaml against the model's positions.

    Args:
        arch: The model.
        key: Of the length.
        length: Tokens.

    Returns:
        A warning, if the model computes positions and was not trained on so many; else None.

    Raises:
        StageError: config_invalid, if the model has no such position.
    """
    limit = learned_positions(arch)
    if limit is not None and length > limit:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"{key}: expected {limit} tokens at most, which are all positions that the model has, "
            f"found {length}; set {key}={limit} or less",
        )
    if arch.max_positions and length > arch.max_positions:
        return (
            f"{key}: {length} tokens are more than the {arch.max_positions} positions that "
            "config.json names; the model goes on beyond them, with positions that it may not "
            f"have seen in training; set {key}={arch.max_positions} or less if that is not meant"
        )
    return None


def check_item_lengths(arch: Architecture, lengths: Mapping[str, int]) -> str | None:
    """Check the questions of a gold set against the model's positions.

    Args:
        arch: The model.
        lengths: An item's id and line → the tokens that scoring it takes.

    Returns:
        A warning, as `check_length` does.

    Raises:
        StageError: dataset_invalid, with all items that are too long.
    """
    if not arch.max_positions:
        return None
    long = {name: length for name, length in lengths.items() if length > arch.max_positions}
    if not long:
        return None
    found = "; ".join(f"{name} has {length}" for name, length in list(long.items())[:SHOWN])
    more = f"; and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    if learned_positions(arch) is None:
        return (
            f"{len(long)} gold items take more than the {arch.max_positions} positions that "
            f"config.json names, and the model goes on beyond them: {found}{more}"
        )
    raise StageError(
        Failure.DATASET_INVALID,
        f"expected gold items of {arch.max_positions} tokens at most with their answers, which are "
        f"all positions that the model has, found {len(long)} that are longer: {found}{more}; "
        "shorten them, or their max_tokens",
        Reason.EVAL_DATASET_MISSING,
    )
