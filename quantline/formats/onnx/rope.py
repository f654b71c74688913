"""Rotary embeddings that depend on the length of the text, which a graph cannot hold."""

from quantline.errors import Failure, StageError
from quantline.model.architecture import Architecture

DYNAMIC = ("dynamic",)


def kind_of(arch: Architecture) -> str:
    """Return the kind of scaling; "default" for none."""
    return (arch.rope_scaling or {}).get("rope_type", "default")


def check_rope(arch: Architecture) -> None:
    """Refuse frequencies that change with every length, of which a trace freezes one.

    Raises:
        StageError: unsupported_architecture.
    """
    kind = kind_of(arch)
    if kind in DYNAMIC:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            "expected a rotary embedding that does not depend on the length of the text for ONNX, "
            f"found rope scaling {kind!r} in config.json, which a graph would freeze; choose "
            "format safetensors",
        )


def longest(arch: Architecture) -> int:
    """Return up to how many tokens a graph is the model."""
    if kind_of(arch) != "longrope":
        return arch.max_positions
    original = (arch.rope_scaling or {}).get("original_max_position_embeddings")
    return min(arch.max_positions, int(original or arch.max_positions))


def limits(arch: Architecture) -> list[str]:
    """Say beyond which length the graph is another model."""
    length = longest(arch)
    if length == arch.max_positions:
        return []
    return [
        f"the graph has the rotary factors for up to {length} tokens, and is another model beyond "
        f"them; the checkpoint has others for up to {arch.max_positions}"
    ]
