"""A mixture with an expert that its router never chooses."""

from pathlib import Path

import torch

from tests.helpers.models import write_model
from tests.helpers.tensor_files import read_tensors, write_tensors


def write_lonely_mixture(folder: Path) -> Path:
    """Write a Mixtral with one expert a token, of which the last of four is never chosen.

    Its row of the router is the mean of the others'.
    """
    write_model(
        folder,
        "mixtral",
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    tensors = read_tensors(folder)
    routers = [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        tensors[name][3] = tensors[name][:3].mean(0)
    write_tensors(folder / "model.safetensors", tensors)
    return folder
