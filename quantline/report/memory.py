"""The memory that a variant takes while it serves: measured, or its size; and the KV cache."""

from pathlib import Path
from typing import Any

from quantline.config.runtimes import RUNTIMES
from quantline.config.targets import Target
from quantline.errors import Failure, StageError
from quantline.files import MIB
from quantline.model.architecture import Architecture
from quantline.model.configuration import CONFIG
from quantline.model.read_architecture import architecture_of_folder
from quantline.report.variant import VariantRow
from quantline.run.lineage import make_again

NO_MODEL = "the model's config.json is not there"


def read_architecture(model: Path) -> Architecture | None:
    """Return the architecture of the model in a folder; None if there is none (yet).

    Raises:
        StageError: missing_file or artifact_changed, for a file that no stage wrote.
    """
    config = model / CONFIG
    if not config.is_file():
        return None
    try:
        return architecture_of_folder(model)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected the configuration of a model in {config}, found {type(error).__name__}: "
            f"{error}; {make_again(model.name)}",
        ) from error


def kv_cache_bytes(arch: Architecture, context: int, value_bytes: int) -> int:
    """Return the size of keys and values of every layer for one sequence.

    A sliding window is not counted off.

    Args:
        arch: Of the model.
        context: Tokens of the sequence.
        value_bytes: Bytes of one cached key or value.
    """
    return 2 * arch.layers * arch.kv_heads * arch.head_dim * value_bytes * context


def memory_use(row: VariantRow, target: Target, arch: Architecture | None) -> dict[str, Any]:
    """Return what a measured variant takes while it serves.

    Without a context it is the measuring process's peak, which nothing is added to. With one, the
    KV cache at that length is added to that peak, or, where the hardware is not this machine's
    (`memory: size`), to the size on disk.

    Args:
        row: With metrics and speed.
        target: Says what counts.
        arch: Of the model; None if its config.json is not there.

    Returns:
        {mib, provenance, formula}; `mib` is None if a part of it is not known.
    """
    measured = target.memory == "measured"
    base = row.speed.get("peak_rss_mib") if measured else row.metrics["size_bytes"] / MIB
    source = "measured peak" if measured else "size on disk"
    provenance = "measured" if measured and target.context is None else "estimated"
    result = {"mib": None, "provenance": provenance}
    if base is None:
        return result | {"formula": f"the {source} is not known"}
    if target.context is None:
        return result | {"mib": base, "formula": f"{base:.0f} MiB {source}"}
    if arch is None:
        return result | {"formula": NO_MODEL}
    value_bytes = RUNTIMES[row.runtime].kv_bytes
    cache = kv_cache_bytes(arch, target.context, value_bytes) / MIB
    formula = (
        f"{base:.1f} MiB {source} + 2 × {arch.layers} layers × {arch.kv_heads} KV heads × "
        f"{arch.head_dim} wide × {value_bytes} bytes × {target.context} tokens = "
        f"{base:.1f} + {cache:.1f} MiB"
    )
    return result | {"mib": base + cache, "formula": formula}
