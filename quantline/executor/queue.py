"""The folder through which workers get their items and give back results.

Every machine sees it in the same place. A worker claims an item by a hard link, which exists whole
or not at all, also on NFS. Should two do the same item nevertheless, they make the same bytes, and
the second result is dropped.

    <folder>/results/<item>/           what was made of an item, with all its files
    <folder>/<session>/queue.json      the items in their order, and what workers need to know
    <folder>/<session>/items/<item>.json
    <folder>/<session>/workers/<worker>
    <folder>/<session>/claims/<item>   a link to the file of the worker that does it
    <folder>/<session>/failures/<item>.json
    <folder>/<session>/work/           results that are being made

Each run has a session of its own, so that a worker that an earlier run left behind finds its folder
gone, and ends.
"""

import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from quantline.durable import temporary_path
from quantline.executor.item import Item
from quantline.files import read_json, write_json

RESULTS = "results"
QUEUE = "queue.json"
FOLDERS = ("items", "workers", "claims", "failures", "work", "logs")


class Queue:
    """One session.

    Attributes:
        folder: The session's, absolute.
        order: The ids of the items; those before are claimed first.
        project: The working folder of the stage, which workers go to.
        gpus: That each worker has to find.
    """

    def __init__(self, folder: Path) -> None:
        """Open a session. Raises StageError: missing_file, if it has ended."""
        self.folder = folder
        self.results = folder.parent / RESULTS
        values = read_json(folder / QUEUE)
        self.order: list[str] = values["order"]
        self.project = Path(values["project"])
        self.gpus: int = values["gpus"]

    @classmethod
    def begin(cls, folder: Path, items: Sequence[Item], gpus: int = 0) -> "Queue":
        """Begin a session in a folder, in which an earlier one may have left results.

        Args:
            folder: Of all sessions.
            items: What is to be done, in the order in which it is given out.
            gpus: That each worker has to find.
        """
        folder = folder.resolve()
        wanted = {item.id for item in items}
        if folder.is_dir():
            for left in folder.iterdir():
                if left.name != RESULTS:
                    shutil.rmtree(left, ignore_errors=True)
        (folder / RESULTS).mkdir(parents=True, exist_ok=True)
        for result in (folder / RESULTS).iterdir():
            if result.name not in wanted:
                shutil.rmtree(result, ignore_errors=True)
        session = folder / f"session-{secrets.token_hex(4)}"
        for name in FOLDERS:
            (session / name).mkdir(parents=True)
        for item in items:
            item.write(session / "items" / f"{item.id}.json")
        order = [item.id for item in items]
        write_json(
            session / QUEUE, {"order": order, "project": str(Path.cwd().resolve()), "gpus": gpus}
        )
        return cls(session)

    def remove(self) -> None:
        """Remove all sessions and results; what a worker still writes finds no folder."""
        folder = self.folder.parent
        aside = temporary_path(folder)
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def add_worker(self, name: str) -> None:
        """Write down a worker before it starts."""
        (self.folder / "workers" / name).write_text(f"{name}\n", encoding="utf-8")

    def log(self, worker: str) -> Path:
        """Return the file for what a worker says."""
        return self.folder / "logs" / f"{worker}.txt"

    def claim(self, worker: str) -> Item | None:
        """Give a worker the next item; None if there is none left for it.

        What comes after an item that failed is given to nobody.
        """
        holder = self.folder / "workers" / worker
        for item_id in self.order:
            if self.failed(item_id):
                return None
            if self.result(item_id) is not None:
                continue
            try:
                os.link(holder, self._claim(item_id))
                return Item.read(self.folder / "items" / f"{item_id}.json")
            except FileExistsError:
                continue
            except FileNotFoundError:  # the session has ended
                return None
        return None

    def work_folder(self, item_id: str, worker: str) -> Path:
        """Return an empty folder in which a worker makes a result."""
        folder = self.folder / "work" / f"{item_id}.{worker}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def finish(self, item_id: str, made: Path) -> None:
        """Give a result its name, unless another worker was first, or the session has ended.

        Raises:
            OSError: If it cannot be renamed for another cause.
        """
        try:
            os.rename(made, self.results / item_id)
        except OSError:
            if self.folder.is_dir() and self.result(item_id) is None:
                raise
            shutil.rmtree(made, ignore_errors=True)

    def fail(self, item_id: str, answer: dict[str, Any]) -> None:
        """Write why an item failed; nothing if the session has ended."""
        if self.folder.is_dir():
            write_json(self.folder / "failures" / f"{item_id}.json", answer)

    def failed(self, item_id: str) -> bool:
        """Whether an item failed."""
        return (self.folder / "failures" / f"{item_id}.json").is_file()

    def failure(self, item_id: str) -> dict[str, Any]:
        """Return what `fail` was given."""
        return read_json(self.folder / "failures" / f"{item_id}.json")

    def result(self, item_id: str) -> Path | None:
        """Return the folder that was made of an item; None if it is not there yet."""
        folder = self.results / item_id
        return folder if folder.is_dir() else None

    def release(self, worker: str, pending: Collection[str]) -> list[str]:
        """Take back what a worker has claimed and not finished, for others to claim.

        Args:
            worker: One that has ended.
            pending: Ids of the items whose results were not taken yet.

        Returns:
            The ids that it lost.
        """
        holder = (self.folder / "workers" / worker).stat()
        lost = []
        for item_id in pending:
            claim = self._claim(item_id)
            if self.failed(item_id) or self.result(item_id) is not None or not claim.exists():
                continue
            if os.path.samestat(claim.stat(), holder):
                claim.unlink()
                lost.append(item_id)
        return lost

    def unclaimed(self, pending: Collection[str]) -> list[str]:
        """Return the ids that a further worker could claim, of those that are pending."""
        free = []
        for item_id in self.order:
            if self.failed(item_id):
                break
            waits = item_id in pending and self.result(item_id) is None
            if waits and not self._claim(item_id).exists():
                free.append(item_id)
        return free

    def claimed(self, pending: Collection[str]) -> int:
        """Return how many of the items that are pending some worker is doing."""
        count = 0
        for item_id in pending:
            over = self.failed(item_id) or self.result(item_id) is not None
            count += not over and self._claim(item_id).exists()
        return count

    def _claim(self, item_id: str) -> Path:
        return self.folder / "claims" / item_id
