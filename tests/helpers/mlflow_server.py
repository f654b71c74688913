"""An MLflow server on this machine."""

import sys
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

from tests.helpers.loopback_server import serving


def mlflow_server(folder: Path, store: str) -> AbstractContextManager[str]:
    """Run a server; yield its address.

    Args:
        folder: For the files of runs.
        store: Address of the database, whose tables are there.
    """

    def command(port: int) -> list[str]:
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--workers", "1", "--backend-store-uri", store]
        return [*words, "--artifacts-destination", str(folder)]

    return serving(command, _answers)


def _answers(address: str) -> bool:
    """Return whether the server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=30):
            return True
    except urllib.error.URLError:
        return False
