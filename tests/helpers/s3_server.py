"""A server that speaks S3, of moto, on this machine."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

WAIT_S = 120


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Run a server with an empty bucket; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WAIT_S
        while not _make_bucket(f"{address}/{bucket}"):
            assert time.monotonic() < deadline and server.poll() is None, "no server"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def _make_bucket(address: str) -> bool:
    """Make a bucket; return whether the server answers."""
    request = urllib.request.Request(address, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=30):
            return True
    except urllib.error.URLError:
        return False
