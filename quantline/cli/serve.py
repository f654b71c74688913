"""`quantline serve`: a bundle's runtime serves it, with that runtime's own server."""

import os
from typing import Annotated

import typer

from quantline.cli.bundles import find_bundle
from quantline.cli.program import app, stop
from quantline.errors import ConfigError, StageError
from quantline.messages import say


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    variant: Annotated[
        str,
        typer.Argument(
            help="A variant of the project, or the folder of a bundle", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Name or address of the interface")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port")] = 8000,
) -> None:
    """Serve a checked bundle with OpenAI's protocol, until Ctrl-C.

    GGUF is served by llama-cpp-python (the extra serve), safetensors by vLLM. Further options are
    the server's own: quantline serve gguf-q4_k_m --port 8080 --n_ctx 4096
    """
    from quantline.runtimes.servers import Address, server_command

    try:
        bundle = find_bundle(variant)
        runtime = bundle.manifest["runtime"]
        # vLLM, which serves what transformers measures, may have an environment of its own.
        own = bundle.pythons.get("vllm" if runtime == "transformers" else runtime)
        address = Address(host, port, bundle.manifest["variant"], own)
        command = [*server_command(runtime, bundle.folder, address), *context.args]
    except (ConfigError, StageError) as error:
        raise stop(error) from None
    say(f"{address.model} at http://{host}:{port}/v1 (Ctrl-C ends it): {' '.join(command)}")
    os.execvp(command[0], command)
