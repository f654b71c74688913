"""Curvature rounding: move integers and scales to where the KL divergence rises least.

It follows any other rounding. The divergence that a rounding error Δ [out, in] causes is about
tr(G Δ H Δᵀ) / 2, with H the second moments of the layer's inputs and G those of the gradient at its
outputs (quantline/calibration/output_moments.py). Rounds alternate between the scales, refitted
given the integers, and coordinate descent on the integers given the scales (curvature_descent.py).
Rounding with both Kronecker factors, H and G, follows YAQA (Tseng et al. 2025); the descent is our
own.

"Steps" are integers minus zero points: how many scales a weight is from zero.
"""

from dataclasses import replace

import torch

from quantline.methods.integer import conjugate_gradients
from quantline.methods.integer.curvature_descent import descend
from quantline.methods.integer.output_error import row_dots
from quantline.quantized.tensors import GroupedLinear

ROUNDS = 8  # over the integers, at most; by then the figure hardly falls any more
REFITS = 4  # of these, the first; after them the scales stay
# Of the integers in a round after which there is no other. Further rounds lower the figure, and on
# a real model nothing else (benchmarks/README.md, "What the rounds after GPTQ bring").
UNMOVED_SHARE = 0.99
SOLVER_STEPS = 2  # of conjugate gradients in each refit; the rounds do the rest
DAMPING_IN = 0.01  # share of the mean diagonal that is added to H
DAMPING_OUT = 0.1  # the same for G


def add_damping(matrices: torch.Tensor, share: float) -> torch.Tensor:
    """Return H or the blocks of G, [..., n, n], with a share of the mean diagonal added."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return matrices + share * mean * torch.eye(matrices.shape[-1], device=matrices.device)


def divergence(difference: torch.Tensor, hessian: torch.Tensor, fisher_out: torch.Tensor) -> float:
    """Return tr(G Δ H Δᵀ), twice the KL divergence that a change of a layer is predicted to cause.

    Args:
        difference: Δ, float32 [out, in].
        hessian: H, float32 [in, in].
        fisher_out: The diagonal blocks of G, float32 [blocks, n, n].
    """
    rows = difference.reshape(len(fisher_out), -1, difference.shape[1])
    product = (fisher_out @ rows @ hessian).reshape(difference.shape)
    return float(row_dots(product, difference).sum())


def error_and_divergence(
    difference: torch.Tensor, hessian: torch.Tensor, fisher_out: torch.Tensor | None
) -> tuple[float, float | None]:
    """Return tr(Δ H Δᵀ) and tr(G Δ H Δᵀ), which share the product Δ H.

    Args:
        difference: Δ, float32 [out, in].
        hessian: H, float32 [in, in].
        fisher_out: The diagonal blocks of G, float32 [blocks, n, n]; None where there is no G, and
            then there is no divergence.
    """
    product = difference @ hessian
    error = float(row_dots(product, difference).sum())
    if fisher_out is None:
        return error, None
    shape = (len(fisher_out), -1, difference.shape[1])
    weighted = (fisher_out @ product.reshape(shape)).reshape(difference.shape)
    return error, float(row_dots(weighted, difference).sum())


def refit_scales(
    steps: torch.Tensor,
    scales: torch.Tensor,
    hessian_product: torch.Tensor,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """Return the scales of all groups, refitted at once for fixed steps.

    tr(G Δ H Δᵀ) is a quadratic form in the scales: with U_g [rows, group size] the steps of a
    group, its slope is the row sums of U_g ∘ (G Δ H)_g and its curvature in one scale
    G_ii (U_g H_gg U_gᵀ)_ii. A scale that would turn negative stays as it is. Scales are values that
    bfloat16 holds exactly.

    Args:
        steps: float32 [out, in].
        scales: float32 [out, groups].
        hessian_product: Δ H, float32 [out, in]; it is changed to that of the new scales.
        hessian: H, float32 [in, in].
        fisher_out: G, float32 [blocks, n, n].
        group_size: Inputs that share a scale.

    Returns:
        float32 [out, groups].
    """
    shape = (*fisher_out.shape[:2], scales.shape[1], group_size)
    grouped = steps.reshape(shape)
    old = scales.reshape(shape[:3])

    def product_of(change: torch.Tensor) -> torch.Tensor:
        """Return Δ H where Δ is the steps times a change of the scales."""
        return (grouped * change[..., None]).reshape(steps.shape) @ hessian

    def slope(product: torch.Tensor) -> torch.Tensor:
        """Return the slope in the scales for a Δ H."""
        gradient = fisher_out @ product.reshape(*shape[:2], -1)
        return (grouped * gradient.reshape(shape)).sum(3)

    starts = range(0, len(hessian), group_size)
    spans = [slice(start, start + group_size) for start in starts]
    group_hessians = torch.stack([hessian[span, span] for span in spans])
    by_group = steps.reshape(len(steps), -1, group_size).transpose(0, 1)
    products = (by_group @ group_hessians).transpose(0, 1).reshape(shape)
    diagonal = (products * grouped).sum(3) * fisher_out.diagonal(dim1=1, dim2=2)[..., None]
    change = conjugate_gradients.solve(
        lambda change: slope(product_of(change)), diagonal, -slope(hessian_product), SOLVER_STEPS
    )
    wanted = (old + change).bfloat16().float()
    new = torch.where((wanted > 0) & torch.isfinite(wanted), wanted, old)
    hessian_product += product_of(new - old)
    return new.reshape(scales.shape)


def refine(
    linear: GroupedLinear,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
    rounds: int = ROUNDS,
) -> GroupedLinear:
    """Move integers and scales of a rounded weight to where tr(G Δ H Δᵀ) is least.

    Zero points stay. The result is never worse than what came in.

    Args:
        linear: The rounded weight.
        weight: The unquantized weight, float32 [out, in].
        hessian: H, float32 [in, in].
        fisher_out: G, float32 [blocks, n, n].
        rounds: At most so many.

    Returns:
        The refined weight; `linear` itself if tr(G Δ H Δᵀ) would rise.
    """
    device = weight.device
    group_size = linear.group_size
    damped_hessian = add_damping(hessian, DAMPING_IN)
    damped_fisher = add_damping(fisher_out, DAMPING_OUT)
    zeros = torch.from_numpy(linear.zeros).to(device).float().repeat_interleave(group_size, 1)
    steps = torch.from_numpy(linear.integers).to(device).float() - zeros
    scales = torch.from_numpy(linear.scales).to(device).float()
    low = -zeros
    high = 2**linear.bits - 1 - zeros
    hessian_on_cpu = damped_hessian.cpu()
    fisher_on_cpu = damped_fisher.cpu()

    def difference() -> torch.Tensor:
        return steps * scales.repeat_interleave(group_size, 1) - weight

    before = divergence(difference(), damped_hessian, damped_fisher)
    hessian_product = difference() @ damped_hessian
    for number in range(rounds):
        if number < REFITS:
            scales = refit_scales(
                steps, scales, hessian_product, damped_hessian, damped_fisher, group_size
            )
        product_on_cpu = hessian_product.cpu()
        moved = descend(
            steps.cpu(),
            low.cpu(),
            high.cpu(),
            scales.repeat_interleave(group_size, 1).cpu(),
            product_on_cpu,
            hessian_on_cpu,
            fisher_on_cpu,
        ).to(device)
        hessian_product = product_on_cpu.to(device)
        unmoved = (moved == steps).float().mean()
        steps = moved
        if unmoved >= UNMOVED_SHARE:
            break
    if not divergence(difference(), damped_hessian, damped_fisher) <= before:
        return linear
    integers = (steps + zeros).to(torch.uint8).cpu().numpy()
    return replace(linear, integers=integers, scales=scales.cpu().numpy())
