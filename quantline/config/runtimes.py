"""What quantline knows about a runtime without importing it.

A runtime is one module: it registers a `RuntimeInfo` here, which names its engine. See
CONTRIBUTING.md, "Add a runtime".
"""

from dataclasses import dataclass

from quantline.registry import Registry


@dataclass(frozen=True)
class RuntimeInfo:
    """One engine that serves bundles.

    Attributes:
        name: What params.yaml calls it.
        engine: "module:Class" of the engine, imported when it is used.
        modules: What the engine imports; it is imported before loading is timed.
        formats: Containers that it serves.
        install: The command that installs it, or what else to do.
        kv_bytes: Bytes of one cached key or value as the runtime serves by default.
        server: "module:function" that returns the command of a server of its bundles, called with
            a bundle's folder and a quantline.runtimes.servers.Address; "" where there is none.
    """

    name: str
    engine: str
    modules: tuple[str, ...]
    formats: tuple[str, ...]
    install: str
    kv_bytes: int
    server: str = ""


RUNTIMES: Registry[RuntimeInfo] = Registry("runtime")


def register_runtime(info: RuntimeInfo) -> RuntimeInfo:
    """Register a runtime under its name and return it."""
    RUNTIMES.add(info.name, info)
    return info


def runtimes_of(container: str) -> list[str]:
    """Return the names of the runtimes that serve a container."""
    return [info.name for info in RUNTIMES.values() if container in info.formats]
