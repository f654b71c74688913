"""What a model gives its decoder blocks besides hidden states, recorded without running them."""

import hashlib
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from quantline.errors import Failure, StageError
from quantline.model.shared_state import SharedState, map_tensors


class Call(NamedTuple):
    """How a block is called.

    Attributes:
        hidden: The place of the hidden states: a position, or the name of an argument.
        args: The arguments that have a position; None in the place of the hidden states.
        kwargs: The arguments that have a name.
    """

    hidden: int | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Run a block on hidden states; return those that leave it."""
        args = list(self.args)
        kwargs = dict(self.kwargs)
        if isinstance(self.hidden, int):
            args[self.hidden] = states
        else:
            kwargs[self.hidden] = states
        out = block(*args, **kwargs)
        return out[0] if isinstance(out, tuple | list) else out


class Recorded(Exception):
    """Ends a forward pass when all blocks have been called."""


class _StandIn(nn.Module):
    """Stands in for a block: has its attributes and none of its weights."""

    def __init__(self, block: nn.Module, returns: int) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.__dict__["returns"] = returns

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def _answer(self, hidden: torch.Tensor) -> Any:
        """Return hidden states as the block does, which may return a tuple."""
        count = self.__dict__["returns"]
        return (hidden, *[None] * (count - 1)) if count else hidden


@dataclass
class Record:
    """What one forward pass gives the blocks.

    Attributes:
        calls: Of each block.
        entered: What enters the first block.
        passed_on: What the last stand-in returned.
    """

    calls: list[Call] = field(default_factory=list)
    entered: torch.Tensor | None = None
    passed_on: torch.Tensor | None = None


class _Recorder(_StandIn):
    """Passes hidden states on and records what else the block is given."""

    def __init__(self, block: nn.Module, returns: int, record: Record, last: bool) -> None:
        super().__init__(block, returns)
        self.__dict__["record"] = record
        self.last = last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__["record"]
        place = _place_of_hidden(args, kwargs, record.passed_on)
        hidden = args[place] if isinstance(place, int) else kwargs.pop(place)
        if isinstance(place, int):
            args = (*args[:place], None, *args[place + 1 :])
        if record.entered is None:
            record.entered = hidden
        record.passed_on = hidden
        record.calls.append(Call(place, args, kwargs))
        if self.last:
            raise Recorded
        return self._answer(hidden)


class _Player(_StandIn):
    """Returns hidden states that were computed before."""

    def __init__(self, block: nn.Module, returns: int) -> None:
        super().__init__(block, returns)
        self.states: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.states is not None
        return self._answer(self.states)


def _place_of_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], before: torch.Tensor | None
) -> int | str:
    """Return which argument has the hidden states.

    It is the tensor that the block before has returned; of the first block, the first of floats.

    Args:
        args: With a position.
        kwargs: With a name.
        before: What the block before has returned, if there was one.
    """
    floats: list[int | str] = []
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if value is before:
                return place
            if isinstance(place, int) or value.ndim >= 3:
                floats.append(place)
    if not floats:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            "expected decoder blocks that are given hidden states, found some that are given none; "
            "take another model",
        )
    named = [place for place in floats if "hidden" in str(place)]
    return floats[0] if isinstance(floats[0], int) else (named or floats)[0]


class CallRecorder:
    """Records the calls of all blocks, batch by batch; equal tensors are kept once."""

    def __init__(self, blocks: list[nn.Module], returns: tuple[int, ...]) -> None:
        """Record for some blocks.

        Args:
            blocks: The decoder blocks, in order.
            returns: For each how many values it returns; 0 for a tensor that is no tuple.
        """
        self.blocks = blocks
        self.returns = returns
        self.shared: list[list[SharedState]] = []  # for each batch
        self._known: dict[Any, torch.Tensor] = {}

    def stand_ins(self) -> tuple[nn.ModuleList, Record]:
        """Return modules to put in the blocks' place for one pass, and what they record into."""
        record = Record()
        last = len(self.blocks) - 1
        modules = nn.ModuleList(
            _Recorder(block, count, record, last=index == last)
            for index, (block, count) in enumerate(zip(self.blocks, self.returns, strict=True))
        )
        return modules, record

    def keep(self, record: Record) -> list[Call]:
        """Return the calls of one batch in the form that they are kept in.

        Raises:
            StageError: unsupported_architecture, if not every block is called once.
        """
        calls = record.calls
        if len(calls) != len(self.blocks):
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected the model to run each of its {len(self.blocks)} blocks once, found "
                f"{len(calls)} calls; take another model",
            )
        states: dict[int, SharedState] = {}

        def kept(value: Any) -> Any:
            if isinstance(value, MutableMapping):
                return states.setdefault(id(value), SharedState(value))
            return map_tensors(value, self._once)

        result = [
            Call(
                call.hidden,
                tuple(kept(value) for value in call.args),
                {name: kept(value) for name, value in call.kwargs.items()},
            )
            for call in calls
        ]
        self.shared.append(list(states.values()))
        return result

    def _once(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an equal tensor that is kept already, or keep this one."""
        if tensor.is_meta:
            return tensor
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.blake2b(content.data, digest_size=16).digest()
        return self._known.setdefault((tensor.dtype, tuple(tensor.shape), digest), tensor)


@contextmanager
def in_place_of(model: nn.Module, path: str, modules: nn.ModuleList) -> Iterator[None]:
    """Have other modules in the place of a list of blocks."""
    blocks = model.get_submodule(path)
    model.set_submodule(path, modules)
    try:
        yield
    finally:
        model.set_submodule(path, blocks)


def players_of(blocks: list[nn.Module], returns: tuple[int, ...]) -> nn.ModuleList:
    """Return modules that return what `play` gives them, for the blocks' place."""
    return nn.ModuleList(
        _Player(block, count) for block, count in zip(blocks, returns, strict=True)
    )


def play(players: nn.ModuleList, states: torch.Tensor) -> None:
    """Let the blocks' stand-ins return hidden states."""
    for player in players:
        assert isinstance(player, _Player)
        player.states = states
