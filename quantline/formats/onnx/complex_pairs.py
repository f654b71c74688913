"""Complex numbers as pairs of real tensors, while a model is traced: ONNX has no complex products.

Some models turn pairs of a head's channels by multiplying complex numbers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Self
from unittest import mock

import torch


class Pair:
    """A complex tensor by its parts. What is asked of it is asked of both parts."""

    def __init__(self, real: torch.Tensor, imaginary: torch.Tensor) -> None:
        """Take the parts, which are of one shape."""
        self.real = real
        self.imaginary = imaginary
        self.shape = real.shape
        self.ndim = real.ndim
        self.dtype = torch.complex64
        self.device = real.device

    def __getitem__(self, index: Any) -> Self:
        return type(self)(self.real[index], self.imaginary[index])

    def __mul__(self, other: Any) -> Self:
        if not isinstance(other, Pair):
            return type(self)(self.real * other, self.imaginary * other)
        return type(self)(
            self.real * other.real - self.imaginary * other.imaginary,
            self.real * other.imaginary + self.imaginary * other.real,
        )

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        """Return a method that is called on both parts, such as unsqueeze, to or transpose."""

        def call(*args: Any, **options: Any) -> Pair:
            real = getattr(self.real, name)(*args, **options)
            imaginary = getattr(self.imaginary, name)(*args, **options)
            return Pair(real, imaginary)

        return call


def _polar(length: torch.Tensor, angle: torch.Tensor) -> Pair:
    return Pair(length * angle.cos(), length * angle.sin())


def _view_as_complex(x: torch.Tensor) -> Pair:
    return Pair(x[..., 0], x[..., 1])


def _view_as_real(x: Pair) -> torch.Tensor:
    return torch.stack((x.real, x.imaginary), -1)


@contextlib.contextmanager
def in_place_of_complex() -> Iterator[None]:
    """Let torch make and take pairs where it would complex tensors."""
    with (
        mock.patch.object(torch, "polar", _polar),
        mock.patch.object(torch, "view_as_complex", _view_as_complex),
        mock.patch.object(torch, "view_as_real", _view_as_real),
    ):
        yield
