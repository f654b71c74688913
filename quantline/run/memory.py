"""How much memory there is for this process: a container has less than its machine.

The limits are those of the kernel's control groups (cgroups(7)), of both versions: of the group
that the process is in, and of each above it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


class Names(NamedTuple):
    """What the files of a version are called, and a line of memory.stat."""

    limit: str
    anonymous: str


V1 = Names("memory.limit_in_bytes", "total_rss")
V2 = Names("memory.max", "anon")


def allowed_bytes() -> int:
    """Return the memory of this machine, or of the control group, if that is less."""
    import psutil

    limits = [_limit(folder, names) for folder, names in _groups()]
    known = [limit for limit in limits if limit is not None]
    return min([psutil.virtual_memory().total, *known])


def available_bytes() -> int:
    """Return how much of it is free; pages of files count as free, since they can be dropped."""
    import psutil

    free = [psutil.virtual_memory().available]
    for folder, names in _groups():
        limit = _limit(folder, names)
        if limit is not None:
            free.append(max(0, limit - anonymous_bytes(folder, names)))
    return min(free)


def _groups() -> Iterator[tuple[Path, Names]]:
    """Yield the folders of the groups that this process is in."""
    lines = GROUPS.read_text(encoding="utf-8").splitlines() if GROUPS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, names = (MOUNT / "memory", V1) if controllers else (MOUNT, V2)
        folder = mount / path.lstrip("/")
        # A container may see its group as the root, under a path that is not there.
        for one in (folder, *folder.parents):
            if one.is_relative_to(mount) and (one / names.limit).is_file():
                yield one, names


def _limit(folder: Path, names: Names) -> int | None:
    """Return the limit of a group; None for none."""
    text = (folder / names.limit).read_text(encoding="utf-8").strip()
    return int(text) if text.isdigit() else None


def anonymous_bytes(folder: Path, names: Names) -> int:
    """Return the memory of a group's processes that is no page of a file."""
    for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(" ")
        if key == names.anonymous:
            return int(value)
    return 0
