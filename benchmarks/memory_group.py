"""A control group of the kernel, whose processes together get so much memory and no more."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")
POLL_SECONDS = 0.02
# Names of the limit and of anonymous memory, by the version of control groups.
VERSIONS = {
    1: (ROOT / "memory", "memory.limit_in_bytes", "total_rss"),
    2: (ROOT, "memory.max", "anon"),
}


class MemoryGroup:
    """A control group of this machine; pages of files count too, and the kernel drops them first.

    Attributes:
        folder: Of the kernel's own file system.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Make the group. No swap: what does not fit is killed.

        Args:
            name: Of its folder; it must not exist.
            limit_bytes: What all its processes get together.

        Raises:
            PermissionError: Without the right to make groups, which root has.
        """
        parent, limit, self._anonymous = VERSIONS[1 if VERSIONS[1][0].is_dir() else 2]
        self.folder = parent / name
        self.folder.mkdir()
        (self.folder / limit).write_text(str(limit_bytes))
        swap = self.folder / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")

    def __enter__(self) -> "MemoryGroup":
        """Return the group."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the group, which no process is in any more."""
        self.folder.rmdir()

    def join(self) -> None:
        """Put this process into the group, for `preexec_fn`."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def anonymous_bytes(self) -> int:
        """Return the present anonymous memory (what is no page of a file) of all processes."""
        for line in (self.folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == self._anonymous:
                return int(value)
        raise LookupError(f"{self.folder}/memory.stat has no {self._anonymous}")

    @contextmanager
    def watch(self) -> Iterator[list[int]]:
        """Watch the group's anonymous memory meanwhile.

        Yields:
            A list that ends up with the peak in bytes, as it was polled.
        """
        peak = [0]
        over = threading.Event()

        def poll() -> None:
            while not over.wait(POLL_SECONDS):
                peak[0] = max(peak[0], self.anonymous_bytes())

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield peak
        finally:
            over.set()
            poller.join()
