"""What the linear layers of a block are given in one run, and what that follows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from quantline.model.data_flow import Place, tensors_in
from quantline.model.family import InputGroup
from quantline.model.fold_test import is_transposed, powers_of_two

FAR_EXPONENT = 12  # of scales that are large enough to show a clamp between two layers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[], Any]


class RecordedInputs:
    """One run of a block.

    Attributes:
        inputs: Linear layer → what it is given, call by call.
        places: The same, as where it lies in memory: equal for one tensor, also if it is viewed in
            another shape.
        arguments: Other module → the arguments of its first call.
        crooked: Linear layers that do more than multiply by their weight and add their bias.
        result: What the run returned.
    """

    def __init__(
        self, run: Run, linears: dict[str, nn.Module], others: dict[str, nn.Module]
    ) -> None:
        """Run the block.

        Args:
            run: Calls it.
            linears: Linear layers, by name.
            others: Modules whose arguments are wanted.
        """
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.places: dict[str, list[Place]] = {}
        self.arguments: dict[str, Arguments] = {}
        self.crooked: set[str] = set()
        self._held: list[torch.Tensor] = []  # so that no address is given twice
        handles = []
        for name, module in linears.items():
            after = self._after(name, _multiplies_only(module))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        for name, module in others.items():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
        with _removed_at_end(handles), torch.no_grad():
            self.result = run()
        self._held.clear()

    def _before(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.arguments:
                self.arguments[name] = tree_map(_cloned, (args, kwargs))

        return note

    def _after(self, name: str, is_plain: bool) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = tensors_in((args, kwargs))[0]
            self.inputs.setdefault(name, []).append(given.clone())
            self.places.setdefault(name, []).append(_place(given))
            self._held.append(given)
            if is_plain and not out.isnan().any():
                return
            weight = module.get_parameter("weight")
            matrix = weight.T if is_transposed(module) else weight
            bias = module.bias if isinstance(module.bias, torch.Tensor) else None
            expected = nn.functional.linear(given, matrix, bias)
            is_like_it = isinstance(out, torch.Tensor) and out.shape == expected.shape
            if not is_like_it or not torch.allclose(out, expected, 1e-3, 1e-4):
                self.crooked.add(name)

        return note

    def following(
        self, block: nn.Module, run: Run, pairs: Sequence[InputGroup], generator: torch.Generator
    ) -> list[InputGroup]:
        """Return the pairs whose input is scaled just as the output of the module before it.

        One run tells it of all pairs: every input is replaced by what it was in the recorded run,
        so that no scale goes further. Every module may be before one pair only.
        """
        checks: dict[InputGroup, list[bool]] = {pair: [] for pair in pairs}
        handles = []
        for pair in pairs:
            width = self.inputs[pair.linears[0]][0].shape[-1]
            scales = powers_of_two(width, generator, FAR_EXPONENT)
            before = block.get_submodule(str(pair.before))
            handles.append(before.register_forward_hook(_scaled_by(scales)))
            for name in pair.linears:
                hook = self._checking(name, scales, checks[pair])
                linear = block.get_submodule(name)
                handles.append(linear.register_forward_pre_hook(hook, with_kwargs=True))
        with _removed_at_end(handles), torch.no_grad():
            run()
        return [pair for pair, found in checks.items() if found and all(found)]

    def _checking(
        self, name: str, scales: torch.Tensor, checks: list[bool]
    ) -> Callable[..., Arguments]:
        """Return a hook that puts the recorded input in an input's place, and compares the two."""
        recorded = iter(self.inputs[name])

        def check(module: nn.Module, args: Any, kwargs: Any) -> Arguments:
            given = tensors_in((args, kwargs))[0]
            expected = next(recorded)
            checks.append(torch.equal(given, expected * scales.to(expected.device)))

            def replaced(value: Any) -> Any:
                return expected if value is given else value

            return tree_map(replaced, (args, kwargs))

        return check


def _multiplies_only(module: nn.Module) -> bool:
    """Whether a module's code is that of torch's linear layer, and nothing more."""
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    own = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return own and not has_hooks


def _place(tensor: torch.Tensor) -> Place:
    """Return which numbers a tensor has, in what order; for as long as it is held."""
    layout = None if tensor.is_contiguous() else (tuple(tensor.shape), tensor.stride())
    address = tensor.untyped_storage()._cdata
    offset = tensor.storage_offset()
    return (address, tensor._version, offset, tensor.numel(), tensor.shape[-1], layout)


def _scaled_by(scales: torch.Tensor) -> Callable[..., torch.Tensor]:
    def scale(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * scales.to(out.device)

    return scale


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def _removed_at_end(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
