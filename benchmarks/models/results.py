"""What was found out about every architecture, as one small file that is kept in the repository."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.models.journey import MAKE
from benchmarks.paths import RESULTS, ROOT
from quantline.files import read_json, sha256_files, sha256_json, versions, write_json

FILE = RESULTS / "models.json"
PACKAGES = ("transformers", "torch", "llama-cpp-python", "onnxruntime", "compressed-tensors")
MATRIX = tuple((ROOT / "benchmarks/models").glob("*.py"))
KEY_LETTERS = 12
LONGEST = 240  # characters of a cause
FIGURES = (
    "mean_kld",
    "difference",
    "folded",
    "scaled",
    "converted",
    "layers",
    "rounded",
    "starved",
)


def results_key() -> str:
    """Return the sha256 over the packages' versions and all code that the results depend on."""
    files = [file for room in ("quantline", "stages") for file in (ROOT / room).rglob("*.py")]
    files += [file for file in MATRIX if file.stem not in ("page", "__main__")]
    return sha256_json([versions(*PACKAGES), sha256_files(ROOT, sorted(files))])


def write_results(
    records: Iterable[dict[str, Any]], names: Iterable[str], file: Path = FILE
) -> dict[str, Any]:
    """Write what the records of the journeys say; return it.

    Args:
        records: Of the journeys.
        names: Of all architectures that there are.
        file: Where to write.
    """
    models = {record["name"]: _shortened(record) for record in records}
    results = {
        "versions": versions(*PACKAGES),
        "names": sorted(names),
        "models": dict(sorted(models.items())),
    }
    write_json(file, results)
    return results


def read_results(file: Path = FILE) -> dict[str, Any]:
    """Read what `write_results` has written."""
    return read_json(file)


def _shortened(record: dict[str, Any]) -> dict[str, Any]:
    """Return of a journey what the page shows."""
    short: dict[str, Any] = {
        "code": record.get("key", "")[:KEY_LETTERS],
        "made": record.get("made"),
        "tried": record.get("tried", []),
        "figures": {},
        "failures": {},
    }
    for label, figures in record["figures"].items():
        kept = {name: _rounded(figures[name]) for name in FIGURES if name in figures}
        if kept:
            short["figures"][label] = kept
    for label, step in record["steps"].items():
        if step["failure"]:
            short["failures"][label] = {
                "failure": step["failure"],
                "cause": first_sentence(step["message"]),
            }
    return short


def _rounded(value: Any) -> Any:
    return float(f"{value:.2g}") if isinstance(value, float) else value


def first_sentence(message: str) -> str:
    """Return what was expected and found, without what to do next and without paths."""
    first = message.strip().split("\n")[0].split("; ")[0]
    first = re.sub(r"(/[\w.-]+){2,}", "…", first)
    return first if len(first) <= LONGEST else first[:LONGEST] + "…"


def is_made(model: dict[str, Any]) -> bool:
    """Whether there is a tiny checkpoint of an architecture."""
    return model["made"] is not None and MAKE not in model["failures"]
