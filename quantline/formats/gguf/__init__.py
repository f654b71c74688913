"""GGUF, the format of llama.cpp."""

from quantline.config.containers import ContainerInfo, register_container

register_container(
    ContainerInfo(
        name="gguf",
        implementation="quantline.formats.gguf.container:GgufContainer",
        runtime="llama.cpp",
        carries=frozenset({"none", "ggml"}),
        packages=("gguf", "llama-cpp-python"),
        colour="#c2571a",
        marker="s",
        splits=True,
    )
)
