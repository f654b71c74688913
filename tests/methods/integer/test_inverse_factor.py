"""The factor of the inverse against the definition in float64."""

import pytest
import torch

from quantline.methods.integer.inverse_factor import inverse_factor
from quantline.model.same_bits import same_bits
from quantline.model.triangular import BLOCK


def moments(size: int, tokens: int) -> torch.Tensor:
    """Return second moments [size, size] of inputs of very different sizes that go together."""
    generator = torch.Generator().manual_seed(size)
    common = torch.randn(tokens, 4, generator=generator)
    inputs = torch.randn(tokens, size, generator=generator)
    inputs += common @ torch.randn(4, size, generator=generator)
    inputs *= torch.logspace(-1.5, 1.5, size)[torch.randperm(size, generator=generator)]
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("size", [1, 64, BLOCK, BLOCK + 1, 2 * BLOCK + 300])
@pytest.mark.parametrize("tokens", [40, 3000])
def test_inverse_factor_is_the_cholesky_factor_of_the_inverse(size, tokens):
    hessian = moments(size, tokens)
    before = hessian.clone()
    upper, damping = inverse_factor(hessian, 0.01)
    assert damping == 0.01
    assert torch.equal(hessian, before)
    assert torch.equal(upper, upper.triu())
    exact = hessian.double()
    exact += 0.01 * hessian.diagonal().double().mean() * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(exact), upper=True)
    torch.testing.assert_close(upper.double(), expected, rtol=0, atol=1e-3 * expected.abs().max())
    # What rounding reads: each row over its entry on the diagonal.
    torch.testing.assert_close(
        upper.double() / upper.diagonal().double()[:, None],
        expected / expected.diagonal()[:, None],
        rtol=1e-3,
        atol=1e-3,
    )


def test_inverse_factor_has_the_same_bits_for_any_number_of_threads():
    hessian = moments(BLOCK + 200, 3000)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with same_bits():
                found.append(inverse_factor(hessian, 0.01)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
