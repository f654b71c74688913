"""Which linear layers of a block read one tensor, and what its scales can be folded into.

Nothing is known of the block but that it runs: candidates come from the flow of its tensors
(fold_candidates.py), and a pair counts only if scaling leaves the block's output as it is to the
last bit (fold_test.py). What fails is left alone, and its reason told.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from quantline.causes import OF_MACHINE, failure_of
from quantline.model.family import InputGroup
from quantline.model.fold_candidates import Linears, ObservedBlock, RefusedFold, is_linear
from quantline.model.fold_test import FoldTest
from quantline.model.like_blocks import Shown, shown_by


class TracedInputs(NamedTuple):
    """What was found out about the inputs of a block's linear layers, by names inside the block.

    Attributes:
        groups: The layers that read one tensor each, with what its scales can be folded into, or
            why there is nothing; in the order of use.
        refused: The pairs that are left alone.
        unlike_linear: Layer → why it cannot be taken for a linear layer, though it is one by its
            class: it does more than multiply, or the block uses its weight without calling it.
            What it is given says nothing of how its weight should be rounded.
        shown: What a block like it has to show for this to be so of it too (like_blocks.py); None
            if it has to be traced by itself.
    """

    groups: list[InputGroup]
    refused: list[RefusedFold]
    unlike_linear: dict[str, str]
    shown: Shown | None = None


def find_input_groups(
    block: nn.Module,
    run: Callable[[], Any],
    linears: Collection[str] | None = None,
    shared: Collection[str] = (),
    seed: int = 0,
) -> TracedInputs:
    """Find which linear layers of a block read one tensor, and what is before them.

    The block is run some ten times, so a few tokens are enough. Its weights are as before when it
    is done.

    Args:
        block: The block, in float32.
        run: Calls the block, with the same arguments on the same tokens each time, and returns
            what it returns: a tensor, or several, which all have to stay the same.
        linears: The names of the layers that are rounded; what others read is never scaled. By
            default all linear layers, but for those whose output chooses what is computed, as a
            router's does.
        shared: The names of modules that other blocks have too (see shared_modules); they cannot
            be scaled for one of them alone.
        seed: Of the scales.

    Returns:
        All of those layers, each in one group; and the pairs that were refused.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        observed = ObservedBlock(block, run, linears, shared, generator)
    except Exception as error:
        if failure_of(error) in OF_MACHINE:
            raise
        reason = f"its tensors cannot be followed: {type(error).__name__}: {error}"
        return _alone(block, linears, reason)
    found = _Search(observed, generator).find()
    shown = shown_by(observed.record)
    all_reached = observed.reached.issuperset(observed.wanted)
    return found._replace(
        groups=_with_reasons(found.groups, found.refused),
        shown=shown if all_reached and observed.steady else None,
    )


def shared_modules(blocks: Sequence[nn.Module]) -> list[set[str]]:
    """Return, for each block, the names of its modules whose weights another block has too."""
    owners: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    found = []
    for block in blocks:
        names = set()
        for name, module in block.named_modules():
            if any(len(owners[id(own)]) > 1 for own in module.parameters(recurse=False)):
                names.add(name)
        found.append(names)
    return found


def _alone(block: nn.Module, linears: Collection[str] | None, reason: str) -> TracedInputs:
    """Return every linear layer as a group of its own."""
    found = [name for name, module in block.named_modules() if is_linear(module)]
    names = [(name,) for name in found if linears is None or name in linears]
    groups = [InputGroup(name, reason=reason) for name in names]
    return TracedInputs(groups, [RefusedFold(name, None, reason) for name in names], {})


def _with_reasons(groups: list[InputGroup], refused: list[RefusedFold]) -> list[InputGroup]:
    """Say in each group without a module before it why that is so."""
    reasons: dict[Linears, list[str]] = {}
    for fold in refused:
        said = f"{fold.before}: {fold.reason}" if fold.before else fold.reason
        reasons.setdefault(fold.linears, []).append(said)
    return [
        group if group.before else group._replace(reason="; ".join(reasons[group.linears]))
        for group in groups
    ]


class _Search:
    """The search on one block."""

    def __init__(self, observed: ObservedBlock, generator: torch.Generator) -> None:
        self.observed = observed
        self.block = observed.block
        self.generator = generator
        self.test = FoldTest(self.block, observed.run, observed.norms.keys(), generator)
        self.refused: list[RefusedFold] = []
        self.unlike_linear = {
            name: "it does more than multiply by its weight"
            for name in observed.wanted
            if name in observed.record.crooked
        }

    def find(self) -> TracedInputs:
        """Find the groups, and what is before them."""
        groups = self._reached_groups()
        candidates = {}
        for linears in groups:
            candidates[linears], refused = self.observed.candidates(linears)
            self.refused += refused
        pairs = self._following(candidates)
        passed = {pair.linears: pair for pair in self.test.passing(pairs)}
        for pair in pairs:
            if pair.linears not in passed:
                self._refuse(pair, "scaling both changes what the block returns")
        found = [passed.get(linears, InputGroup(linears)) for linears in groups]
        found += self._other_groups(found)
        return TracedInputs(found, self.refused, self.unlike_linear)

    def _refuse(self, pair: InputGroup, reason: str) -> None:
        self.refused.append(RefusedFold(pair.linears, pair.before, reason))

    def _reached_groups(self) -> list[Linears]:
        """Return the layers that read the same numbers, in the order of use."""
        by_place: dict[Hashable, list[str]] = {}
        for name, calls in self.observed.flow.calls.items():
            if name in self.observed.wanted and name in self.observed.reached:
                by_place.setdefault(tuple(calls.places), []).append(name)
        return [tuple(names) for names in by_place.values()]

    def _following(self, candidates: dict[Linears, list[InputGroup]]) -> list[InputGroup]:
        """Return the first pair of each group whose input follows the output before it."""
        waiting = {linears: list(pairs) for linears, pairs in candidates.items()}
        found = []
        while any(waiting.values()):
            pairs = [pairs.pop(0) for pairs in waiting.values() if pairs]
            following = self.observed.record.following(
                self.block, self.observed.run, pairs, self.generator
            )
            for pair in pairs:
                if pair in following:
                    waiting[pair.linears] = []
                    found.append(pair)
                else:
                    self._refuse(pair, "what they read is not what it gives, number by number")
        return found

    def _other_groups(self, reached: list[InputGroup]) -> list[InputGroup]:
        """Return the groups of the layers that no token came to.

        A module with a number for a name, such as an expert, is like those beside it: what is
        known of one of those is tried on it, with the other's arguments.
        """
        order = list(self.observed.layers)
        names = set(self.observed.wanted) - self.observed.reached
        found: list[InputGroup] = []
        for name in sorted(names, key=order.index):
            if any(name in group.linears for group in found):
                continue
            entry, sibling, groups = self._groups_like_a_siblings(name, reached)
            found += self._passing_alone(entry, sibling, groups)
            if not groups:
                alone = InputGroup((name,))
                self._refuse(alone, "it was not called")
                if not self._has_siblings(name):
                    self.unlike_linear[name] = "it was not called"
                found.append(alone)
        return found

    def _has_siblings(self, name: str) -> bool:
        """Whether a layer has a number for a name, and one beside it was called."""
        parent, _, number = name.rpartition(".")
        beside = (one.rpartition(".") for one in self.observed.reached)
        return number.isdecimal() and any(
            path == parent and other.isdecimal() for path, _, other in beside
        )

    def _groups_like_a_siblings(
        self, name: str, reached: list[InputGroup]
    ) -> tuple[str, str, list[InputGroup]]:
        """Return a numbered module that a layer is in, one beside it, and its groups by that."""
        parts = name.split(".")
        for depth, part in enumerate(parts):
            if not part.isdecimal():
                continue
            parent = ".".join(parts[:depth])
            start = f"{parent}." if parent else ""
            entry = start + part
            for number, _ in self.block.get_submodule(parent).named_children():
                sibling = start + number
                renamed = (_renamed(group, f"{sibling}.", f"{entry}.") for group in reached)
                groups = [group for group in renamed if group and self._can_be(group)]
                if any(name in group.linears for group in groups):
                    return entry, sibling, groups
        return "", "", []

    def _can_be(self, group: InputGroup) -> bool:
        """Whether there is such a group of layers that no token came to."""
        observed = self.observed
        layers = set(observed.wanted) - observed.reached - observed.shared
        before = {*layers, *observed.norms} - observed.shared
        known = group.before is None or group.before in before
        return known and layers.issuperset(group.linears)

    def _passing_alone(
        self, entry: str, sibling: str, groups: list[InputGroup]
    ) -> list[InputGroup]:
        """Return the groups of a module, without what fails on it for another's arguments."""
        pairs = [group for group in groups if group.before is not None]
        passed: list[InputGroup] = []
        if pairs and sibling in self.observed.record.arguments:
            args, kwargs = self.observed.record.arguments[sibling]
            module = self.block.get_submodule(entry)
            norms = self.observed.norms.keys()
            test = FoldTest(self.block, lambda: module(*args, **kwargs), norms, self.generator)
            passed = test.passing(pairs)
        for group in groups:
            if group.before is None:
                self._refuse(group, f"there is nothing for the layers of {sibling} either")
            elif group not in passed:
                self._refuse(group, f"scaling both changes what {entry} returns")
        return [
            group if group.before is None or group in passed else InputGroup(group.linears)
            for group in groups
        ]


def _renamed(group: InputGroup, old: str, new: str) -> InputGroup | None:
    """Return the group of another module whose layers are called alike; None for others'."""
    if not all(linear.startswith(old) for linear in group.linears):
        return None
    linears = tuple(new + linear.removeprefix(old) for linear in group.linears)
    if group.before is None or not group.before.startswith(old):
        return InputGroup(linears)
    return InputGroup(linears, new + group.before.removeprefix(old), group.norm_offset)
