"""The family of a config.json, for models that have a table."""

from typing import Any

from quantline.errors import Failure, StageError
from quantline.model.family import FAMILIES, Family


def family_of(config: dict[str, Any]) -> Family | None:
    """Return the family that config.json names; None if it has no table."""
    name = config.get("model_type")
    return FAMILIES[name] if isinstance(name, str) and name in FAMILIES else None


def known_family(config: dict[str, Any]) -> Family:
    """Return the family that a config.json names. Raises StageError: unsupported_architecture."""
    family = family_of(config)
    if family is None:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected model_type among {', '.join(FAMILIES)}, found {config.get('model_type')!r} "
            "in config.json, and nothing that load has found out about it; run load again",
        )
    return family


def is_tied(configuration: dict[str, Any], family: Family | None) -> bool:
    """Whether the head is the embedding; the family decides where nothing is said of it."""
    default = family.tied if family else False
    return bool(configuration.get("tie_word_embeddings", default))


def tied_head(configuration: dict[str, Any], family: Family | None) -> str | None:
    """Return the tensor of a head that is the embedding; None where the head is its own.

    A checkpoint may hold such a tensor a second time.
    """
    tied = is_tied(configuration, family)
    return f"{family.outside['output']}.weight" if family and tied else None
