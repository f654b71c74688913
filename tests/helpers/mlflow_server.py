"""An MLflow server on this machine."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 120


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[str]:
    """Run a server; yield its address.

    Args:
        folder: For the files of runs.
        store: Address of the database, whose tables are there.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder)]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([*command, "--workers", "1"], stdout=quiet, stderr=quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WAIT_S
        while not _answers(f"{address}/health"):
            assert time.monotonic() < deadline and server.poll() is None, "no server"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def _answers(address: str) -> bool:
    """Return whether a server answers there."""
    try:
        with urllib.request.urlopen(address, timeout=30):
            return True
    except urllib.error.URLError:
        return False
