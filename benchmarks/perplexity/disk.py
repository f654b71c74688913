"""The bytes of both references: 16 bits for each token of the vocabulary, or hidden states."""

from pathlib import Path

from benchmarks.perplexity.project import Reference

# (vocabulary, hidden size) of the demo model and of models that people use.
SIZES = (
    (1280, 256),
    (32000, 2048),
    (128256, 2048),
    (128256, 4096),
    (151936, 1024),
    (262144, 2560),
)


def measure_disk(logits: Path, reference: Reference) -> dict[str, float]:
    """Return the bytes of both references, whole and per scored position.

    The tool stores and scores the second half of a chunk. We store all of it and score all that has
    a token after it.

    Args:
        logits: The tool's file.
        reference: Ours.
    """
    tool_bytes = logits.stat().st_size
    ours_bytes = (reference.folder / "hidden.safetensors").stat().st_size
    chunks, length = reference.tokens.shape
    tool_per_scored = tool_bytes / reference.scored
    ours_per_scored = ours_bytes / (chunks * (length - 1))
    return {
        "tool_bytes": tool_bytes,
        "ours_bytes": ours_bytes,
        "head_bytes": (reference.folder / "head.safetensors").stat().st_size,
        "tool_per_scored": tool_per_scored,
        "ours_per_scored": ours_per_scored,
        "ratio_per_scored": ours_per_scored / tool_per_scored,
        "ratio_of_files": ours_bytes / tool_bytes,
    }


def bytes_by_sizes() -> list[dict[str, float]]:
    """Return bytes per scored token by calculation, for models of several sizes."""
    rows: list[dict[str, float]] = []
    for vocabulary, hidden in SIZES:
        tool = 2 * vocabulary + 8
        ours = 4 * hidden
        rows.append(
            {
                "vocabulary": vocabulary,
                "hidden": hidden,
                "tool": tool,
                "ours": ours,
                "ratio": ours / tool,
            }
        )
    return rows
