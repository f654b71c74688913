"""The triangular factor of the inverse of second moments, which GPTQ's error feedback needs.

Frantar et al. 2022 factor H, invert it, and factor the inverse. Here H is factored from its last
column to its first, and the factor itself is inverted: half the operations, and no rounding of an
inverse.
"""

import torch

from quantline.errors import Failure, StageError
from quantline.model.triangular import factor_in_place, inverse_of

DAMPING_LIMIT = 1.0


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Return U, upper triangular, with UᵀU = (H + d · mean(diag H) · I)⁻¹, and d.

    Args:
        hessian: H, float32 [in, in].
        damping: The first d; while the matrix cannot be factored, d grows tenfold, up to
            DAMPING_LIMIT. From 0.02 it is 0.02 and 0.2.

    Raises:
        StageError: hessian_not_positive_definite, if no d helps that is at most DAMPING_LIMIT.
    """
    tried = []
    while damping <= DAMPING_LIMIT:
        tried.append(f"{damping:g}")
        # With the order of rows and columns turned round, H = L Lᵀ, and U is the inverse of L
        # turned back.
        turned = hessian.flip(0, 1)
        turned.diagonal().add_(damping * hessian.diagonal().mean())
        corners = factor_in_place(turned)
        if corners is not None:
            upper = inverse_of(turned, corners).flip(0, 1)
            if torch.isfinite(upper).all():
                return upper, damping
        damping *= 10
    raise StageError(
        Failure.HESSIAN_NOT_POSITIVE_DEFINITE,
        "expected second moments that can be inverted with a damping of at most "
        f"{DAMPING_LIMIT:g}, found none (tried {', '.join(tried) or 'none'}); calibrate on more "
        "text",
    )
