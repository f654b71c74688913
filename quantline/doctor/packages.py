"""Which of the packages that quantline names are installed, and how to get the others."""

from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from typing import NamedTuple

from quantline.config.runtimes import RUNTIMES

PROJECT = "quantline"
DEVELOPMENT = "dev"  # the extra that only the tests need


class Missing(NamedTuple):
    """Something that is not installed.

    Attributes:
        what: The packages, an extra or a runtime.
        found: What there is instead.
        remedy: How to get it.
    """

    what: str
    found: str
    remedy: str


def missing_requirements() -> list[Missing]:
    """Return the packages without which quantline does not work, in the versions it names."""
    from packaging.requirements import Requirement

    found = []
    for line in distribution(PROJECT).requires or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = _version(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            remedy = f"pip install '{wanted}', or `make` its environment anew"
            found.append(Missing(wanted, have or "none", remedy))
    return found


def missing_extras() -> list[Missing]:
    """Return the extras that are not, or only partly, installed."""
    from packaging.requirements import Requirement

    package = distribution(PROJECT)
    found = []
    for extra in package.metadata.get_all("Provides-Extra") or []:
        absent = []
        for line in package.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": ""}):
                continue
            if marker.evaluate({"extra": extra}) and _version(requirement.name) is None:
                absent.append(requirement.name)
        if absent and extra != DEVELOPMENT:
            remedy = f"pip install -e '.[{extra}]' in quantline's folder"
            found.append(Missing(f"extra {extra}", f"no {', '.join(absent)}", remedy))
    return found


def missing_runtimes() -> dict[str, Missing]:
    """Return the runtimes that are not installed, by their names."""
    found = {}
    for info in RUNTIMES.values():
        absent = [name for name in info.modules if find_spec(name.partition(".")[0]) is None]
        if absent:
            found[info.name] = Missing(info.name, f"no {', '.join(absent)}", info.install)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
