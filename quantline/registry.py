"""Named things that anyone can add: methods, containers, runtimes, model families and metrics.

Registries find their entries in two places. Every module of some packages of quantline is imported,
and each registers what it defines. Then the entry points of a group that goes with each package
are loaded, which is how another distribution adds to quantline without changing it:

    [project.entry-points."quantline.methods"]
    my-method = "my_package.my_method"

A module may register what it likes, a container and its runtime for example, so whichever registry
is read first, all of them are filled.

A registration has to be light, because every stage loads every registry to check params.yaml. What
an entry needs torch, numba or a runtime for is named as "module:Name" and loaded when it is used.
"""

import difflib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from quantline.errors import ConfigError

Entry = TypeVar("Entry")

# Group of entry points → the package of quantline whose modules register the same kind.
SOURCES = {
    "quantline.methods": "quantline.methods",
    "quantline.formats": "quantline.formats",
    "quantline.runtimes": "quantline.runtimes",
    "quantline.families": "quantline.model.families",
    "quantline.metrics": "quantline.metrics.figures",
    "quantline.dequantizers": "quantline.ingest.dequantize.formats",
}


class Registry(Generic[Entry]):
    """The entries of one kind, by name, in the order in which they were registered."""

    def __init__(self, kind: str) -> None:
        """Describe a registry; nothing is imported until it is first read.

        Args:
            kind: What an entry is called in messages, such as "method".
        """
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers what it decorates under `name`.

        Raises:
            ConfigError: If the name is taken.
        """

        def add(entry: Entry) -> Entry:
            self.add(name, entry)
            return entry

        return add

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry. Raises ConfigError if the name is taken."""
        if name in self._entries:
            raise ConfigError(
                f"expected one {self.kind} called {name}, found two; uninstall one of the plugins "
                "that register it"
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of that name. Raises ConfigError that lists the names there are."""
        load_registrations()
        if name not in self._entries:
            raise ConfigError(self.unknown(name))
        return self._entries[name]

    def unknown(self, name: object) -> str:
        """Say that there is no entry of that name, which names there are, and which is near."""
        load_registrations()
        near = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"unknown {self.kind} {name!r}{hint}; there are {', '.join(sorted(self._entries))}"

    def __contains__(self, name: object) -> bool:
        load_registrations()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        load_registrations()
        return iter(self._entries)

    def __len__(self) -> int:
        load_registrations()
        return len(self._entries)

    def values(self) -> list[Entry]:
        """Return all entries."""
        load_registrations()
        return list(self._entries.values())

    def items(self) -> list[tuple[str, Entry]]:
        """Return all names with their entries."""
        load_registrations()
        return list(self._entries.items())


@cache
def load_registrations() -> None:
    """Import what registers entries, once for all registries.

    Raises:
        ConfigError: If a plugin cannot be imported.
    """
    for name in SOURCES.values():
        package = import_module(name)
        for module in sorted(iter_modules(package.__path__), key=lambda module: module.name):
            import_module(f"{name}.{module.name}")
    installed = entry_points()
    for group in SOURCES:
        for point in sorted(installed.select(group=group), key=lambda point: point.name):
            _load_plugin(point)


def _load_plugin(point: EntryPoint) -> None:
    try:
        point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"expected the plugin {point.name} of {point.group} ({point.value}) to load, found "
            f"{type(error).__name__}: {error}; mend or uninstall the plugin"
        ) from error


def load_object(reference: str) -> object:
    """Import what "module:Name" names.

    Raises:
        ImportError: If there is no such module, or it does not import.
        AttributeError: If the module has no such name.
    """
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
