"""A control group of the kernel, whose processes together get so much memory and no more."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from quantline.run.memory import MOUNT, V1, V2, anonymous_bytes

POLL_SECONDS = 0.02


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
        of_version_1 = MOUNT / "memory"
        self._names = V1 if of_version_1.is_dir() else V2
        self.folder = (of_version_1 if of_version_1.is_dir() else MOUNT) / name
        self.folder.mkdir()
        (self.folder / self._names.limit).write_text(str(limit_bytes))
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
                peak[0] = max(peak[0], anonymous_bytes(self.folder, self._names))

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield peak
        finally:
            over.set()
            poller.join()
