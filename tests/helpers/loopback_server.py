"""A server on this machine, for as long as a test needs it."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

WAIT_S = 120


@contextlib.contextmanager
def serving(command: Callable[[int], list[str]], answers: Callable[[str], bool]) -> Iterator[str]:
    """Run a server; yield its address once it answers.

    Args:
        command: What starts it, by its port.
        answers: Whether it answers at an address.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command(port), stdout=quiet, stderr=quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WAIT_S
        while not answers(address):
            assert time.monotonic() < deadline and server.poll() is None, "no server"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()
