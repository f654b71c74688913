"""The commands that start a runtime's own server on a bundle; quantline has no server itself.

Both speak OpenAI's protocol: http://host:port/v1/chat/completions.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, cast

from quantline.config.runtimes import RUNTIMES
from quantline.errors import Failure, StageError
from quantline.model.gguf_files import model_files, projector_files
from quantline.registry import load_object

LLAMA_CPP = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")


class Address(NamedTuple):
    """Where a server is, and what it calls its model.

    Attributes:
        host: Name or number of the interface that it listens at.
        port: Number of the port.
        model: The name that clients ask for.
        python: Interpreter of an environment that has the runtime; None for this one.
    """

    host: str
    port: int
    model: str
    python: str | None = None


def server_command(runtime: str, bundle: Path, address: Address) -> list[str]:
    """Return the command that serves a bundle.

    Args:
        runtime: Where the bundle is measured.
        bundle: Its folder.
        address: Where to serve it.

    Raises:
        StageError: runtime_unavailable, if the runtime has no server or it is not installed.
    """
    reference = RUNTIMES[runtime].server
    if not reference:
        able = ", ".join(sorted(name for name, info in RUNTIMES.items() if info.server))
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            f"expected a runtime with a server of its own ({able}), found {runtime}; ask it with "
            "`quantline chat`, or take the lines of the bundle's README into your own program",
        )
    make = cast(Callable[[Path, Address], list[str]], load_object(reference))
    return make(bundle, address)


def llama_cpp_server(bundle: Path, address: Address) -> list[str]:
    """Return the command of llama-cpp-python's server.

    Raises:
        StageError: runtime_unavailable.
    """
    python = address.python or sys.executable
    absent = [] if address.python else [name for name in LLAMA_CPP if find_spec(name) is None]
    if absent:
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            f"expected the server of llama-cpp-python, found that {', '.join(absent)} are not "
            "installed; install it: pip install 'quantline[serve]'",
        )
    command = [python, "-m", "llama_cpp.server", "--model", str(model_files(bundle)[0])]
    names = [path.name for path in bundle.iterdir()]
    for name in projector_files(names):
        command += ["--clip_model_path", str(bundle / name)]
    command += ["--model_alias", address.model]
    return [*command, "--host", address.host, "--port", str(address.port)]


def vllm_server(bundle: Path, address: Address) -> list[str]:
    """Return the command of vLLM's server.

    Raises:
        StageError: runtime_unavailable.
    """
    if address.python is None and find_spec("vllm") is None:
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            "expected vLLM, whose server takes safetensors, found that it is not installed; "
            f"{RUNTIMES['vllm'].install}, or ask the bundle with `quantline chat`",
        )
    command = [address.python or sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [str(bundle), "--served-model-name", address.model]
    return [*command, "--host", address.host, "--port", str(address.port)]
