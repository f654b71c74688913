"""Random weights for ggml's block types, with second moments of inputs and output gradients."""

from typing import NamedTuple

import numpy as np
import torch

from quantline.methods.ggml.block_types import BLOCK_TYPES
from quantline.methods.ggml.blocks import Blocks, BlockType
from quantline.methods.integer.curvature import divergence

TYPES = sorted(BLOCK_TYPES)


class Layer(NamedTuple):
    """A layer as arrays of numpy.

    Attributes:
        weight: float32 [rows, width].
        hessian: float32 [width, width].
        fisher_out: float32 [blocks, rows / blocks, rows / blocks].
    """

    weight: np.ndarray
    hessian: np.ndarray
    fisher_out: np.ndarray


class TorchLayer(NamedTuple):
    """The same as tensors of torch."""

    weight: torch.Tensor
    hessian: torch.Tensor
    fisher_out: torch.Tensor


def correlated_moments(generator: np.random.Generator, size: int) -> np.ndarray:
    """Return second moments float32 [size, size], correlated as those of a model are."""
    mixing = np.eye(size) + generator.normal(size=(size, size)) / size**0.5
    samples = generator.normal(size=(3 * size, size)) @ mixing
    return (samples.T @ samples / len(samples)).astype(np.float32)


def random_layer(seed: int, rows: int = 8, width: int = 512, blocks: int = 1) -> Layer:
    """Return a layer whose groups of 32 weights differ in size."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(rows, width))
    weight *= np.exp(0.3 * generator.normal(size=(rows, width // 32))).repeat(32, 1)
    hessian = correlated_moments(generator, width)
    fisher_out = [correlated_moments(generator, rows // blocks) for _ in range(blocks)]
    return Layer(weight.astype(np.float32), hessian, np.stack(fisher_out))


def random_torch_layer(seed: int, rows: int = 8, width: int = 512) -> TorchLayer:
    """Return the same as tensors of torch."""
    layer = random_layer(seed, rows, width)
    return TorchLayer(
        torch.from_numpy(layer.weight),
        torch.from_numpy(layer.hessian),
        torch.from_numpy(layer.fisher_out),
    )


def divergence_of_blocks(
    blocks: Blocks,
    block_type: BlockType,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
) -> float:
    """Return tr(G Δ H Δᵀ) of a weight's blocks."""
    rounded = torch.from_numpy(block_type.dequantize(blocks)).reshape(weight.shape)
    return divergence(rounded - weight, hessian, fisher_out)
