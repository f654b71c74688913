"""The method of conjugate gradients (Golub and Van Loan, Matrix Computations, section 11.5)."""

from collections.abc import Callable

import torch


def solve(
    product: Callable[[torch.Tensor], torch.Tensor],
    diagonal: torch.Tensor,
    right: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Return x near to the solution of A x = b, block by block.

    Each step from x = 0 lowers xᵀ A x - 2 bᵀ x. The diagonal of A is the preconditioner.

    Args:
        product: Returns A times a tensor like `right`.
        diagonal: Of A, like `right`. Where it is not positive, x stays 0.
        right: b, float32 [blocks, rows, n].
        steps: How many.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    solution = torch.zeros_like(right)
    residual = right
    preconditioned = inverse * residual
    direction = preconditioned
    size = (residual * preconditioned).sum((1, 2), keepdim=True)
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum((1, 2), keepdim=True)
        length = torch.where(curvature > 0, size / curvature, 0)
        solution = solution + length * direction
        residual = residual - length * image
        preconditioned = inverse * residual
        size_before = size
        size = (residual * preconditioned).sum((1, 2), keepdim=True)
        momentum = torch.where(size_before > 0, size / size_before, 0)
        direction = preconditioned + momentum * direction
    return solution
