"""Which of the packages that quantline names are installed, and how to get the others."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from quantline.config.params import Params
from quantline.config.runtimes import RUNTIMES

PROJECT = "quantline"
EXECUTORS = {"ray": "ray", "slurm": "submitit"}  # kind → the package that it needs
IN_EXTRA = re.compile(r"""extra == ['"]([^'"]+)['"]""")  # of a requirement
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
    for line in _declared()[0]:
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

    found = []
    for extra, lines in _declared()[1].items():
        requirements = [Requirement(line) for line in lines]
        absent = [one.name for one in requirements if _version(one.name) is None]
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


def missing_for(params: Params) -> list[str]:
    """Return what a project's executor and layouts need and is not installed, in sentences."""
    from quantline.formats.safetensors.layouts import LAYOUTS

    found = []
    extras = _declared()[1]  # what everybody needs is told by missing_requirements
    package = EXECUTORS.get(params.executor.kind)
    if package and _version(package) is None:
        kind = params.executor.kind
        found.append(
            f"executor {kind}: {package} is not installed: pip install 'quantline[{kind}]'"
        )
    for name, variant in params.variants.items():
        layout = LAYOUTS.get(variant.layout) if variant.format == "safetensors" else None
        if layout and layout.package in extras and _version(layout.package) is None:
            remedy = f"pip install 'quantline[{layout.package}]'"
            found.append(f"variants.{name}: {layout.package} is not installed: {remedy}")
    return found


def _declared() -> tuple[list[str], dict[str, list[str]]]:
    """Return the packages that quantline names, and those of each extra.

    A clone says it itself: what is installed of it may be from before a `git pull`.
    """
    path = Path("pyproject.toml")
    project = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table = project.get("project", {})
    if table.get("name") == PROJECT:
        return table["dependencies"], table["optional-dependencies"]
    package = distribution(PROJECT)
    extras: dict[str, list[str]] = {}
    needed = []
    for line in package.requires or []:
        extra = IN_EXTRA.search(line)
        if extra:
            extras.setdefault(extra[1], []).append(line.partition(";")[0])
        else:
            needed.append(line)
    return needed, extras


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
