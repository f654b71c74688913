"""A server that speaks S3, of moto, on this machine."""

import sys
import urllib.error
import urllib.request
from contextlib import AbstractContextManager

from tests.helpers.loopback_server import serving


def s3_server(bucket: str) -> AbstractContextManager[str]:
    """Run a server with an empty bucket; yield its address."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    return serving(command, lambda address: _make_bucket(f"{address}/{bucket}"))


def _make_bucket(address: str) -> bool:
    """Make a bucket; return whether the server answers."""
    request = urllib.request.Request(address, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=30):
            return True
    except urllib.error.URLError:
        return False
