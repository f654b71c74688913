"""A database server of PostgreSQL for one test, on a socket in a folder of its own."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534  # the server refuses to run as root
WAIT_S = 60


def _as_somebody(folder: Path) -> dict[str, int]:
    """Return the arguments of subprocess that leave root, and give the folder to that user."""
    if os.getuid():
        return {}
    for parent in (folder, *folder.parents):
        if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    os.chown(folder, NOBODY, NOBODY)
    return {"user": NOBODY, "group": NOBODY}


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a server with an empty database; yield its address for MLflow."""
    folder.mkdir(parents=True)
    who = _as_somebody(folder)
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    init = ["initdb", "-D", str(data), "-U", "quantline", "--auth=trust", "-N"]
    subprocess.run(init, check=True, **quiet, **who)
    serve = ["postgres", "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-F"]
    server = subprocess.Popen(serve, **quiet, **who)
    try:
        deadline = time.monotonic() + WAIT_S
        ready = ["psql", "-h", str(folder), "-U", "quantline", "-d", "postgres", "-c", "select 1"]
        while subprocess.run(ready, check=False, **quiet).returncode:
            assert time.monotonic() < deadline and server.poll() is None, "no server"
            time.sleep(0.2)
        yield f"postgresql+psycopg2://quantline@/postgres?host={folder}"
    finally:
        server.terminate()
        server.wait()
