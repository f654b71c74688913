"""The files of benchmarks.gguf: a random importance matrix, and two quantized files compared."""

from pathlib import Path

import gguf
import numpy as np

from quantline.calibration.store import INFO
from quantline.files import write_json
from quantline.formats.gguf import imatrix
from quantline.formats.gguf.architectures import gguf_names
from quantline.model.checkpoint import Checkpoint

TOKENS = 1000  # that the importance matrix says it comes from


def write_importance_matrix(folder: Path, model: Path) -> None:
    """Write a random importance matrix in llama-imatrix's format.

    Args:
        folder: It is made, and is a calibration that holds nothing else.
        model: The checkpoint.
    """
    checkpoint = Checkpoint(model)
    draw = np.random.default_rng(1)
    entries = {}
    for name, gguf_name in gguf_names(checkpoint).items():
        shape = checkpoint.shape(name)
        if checkpoint.arch.layer_index(name) is not None and len(shape) > 1:
            sums = np.exp(draw.standard_normal((1, shape[-1]), np.float32)) * TOKENS
            entries[gguf_name] = imatrix.Entry(sums, np.full(1, TOKENS, np.float32))
    folder.mkdir()
    matrix = imatrix.ImportanceMatrix(entries, ("random",), 1, TOKENS)
    imatrix.write_importance(folder / imatrix.FILE, matrix, "llama")
    info = {
        "layers": {},
        "tokens": TOKENS,
        "curvature": False,
        "seed": 0,
        "text_sha256": "0" * 64,
    }
    write_json(folder / INFO, info)


def compare_files(ours: Path, theirs: Path) -> dict[str, float]:
    """Compare two GGUF files.

    Returns:
        {tensors, tensors_equal: to the bit, blocks, equal_share: of the blocks}.

    Raises:
        SystemExit: If their tensors do not have the same names and types.
    """
    first = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    second = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    if first.keys() != second.keys():
        raise SystemExit(
            f"expected the same tensors, found {sorted(first.keys() ^ second.keys())} in one file "
            "alone"
        )
    tensors_equal = 0
    blocks = 0
    blocks_equal = 0
    for name, tensor in first.items():
        equal = _equal_blocks(tensor, second[name])
        tensors_equal += bool(equal.all())
        blocks += len(equal)
        blocks_equal += int(equal.sum())
    return {
        "tensors": len(first),
        "tensors_equal": tensors_equal,
        "blocks": blocks,
        "equal_share": blocks_equal / blocks,
    }


def _equal_blocks(ours: gguf.ReaderTensor, theirs: gguf.ReaderTensor) -> np.ndarray:
    """Return which blocks of a tensor are equal, bool [blocks]."""
    if ours.tensor_type != theirs.tensor_type:
        raise SystemExit(
            f"expected {ours.name} in {theirs.tensor_type.name}, found {ours.tensor_type.name}"
        )
    _, block_bytes = gguf.GGML_QUANT_SIZES[ours.tensor_type]
    first = np.asarray(ours.data).view(np.uint8).reshape(-1, block_bytes)
    second = np.asarray(theirs.data).view(np.uint8).reshape(-1, block_bytes)
    return (first == second).all(1)
