"""What a model carries from token to token, found by running it.

Keys and values grow with the text. The last inputs of a convolution and the sum of a recurrence do
not. Layers may have several of them, or none because they read another layer's. All this is
asked of the cache that the model itself returns: of two passes over texts of unlike length, and one
of another number of texts.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from quantline.errors import Failure, StageError

BATCH = "batch"
PAST = "past"
KEY_VALUE = {"keys": "key", "values": "value"}
# Sizes of the passes: texts and tokens in each.
TEXTS = 2
TOKENS = 5
MORE_TEXTS = 3
MORE_TOKENS = 7

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class State:
    """One tensor that goes from step to step.

    Attributes:
        past: Its name among a graph's inputs.
        present: Its name among a graph's outputs.
        place: Where it lies in the cache: names of attributes and numbers of items.
        shape: Sizes, with BATCH and PAST in place of those that vary.
        dtype: What it holds.
    """

    past: str
    present: str
    place: Place
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def zeros(self, texts: int, tokens: int) -> torch.Tensor:
        """Return what it is before the first token, for texts of so many earlier tokens."""
        sizes = {BATCH: texts, PAST: tokens}
        shape = [size if isinstance(size, int) else sizes[size] for size in self.shape]
        return torch.zeros(shape, dtype=self.dtype)

    def axes(self, past: str) -> dict[int, str]:
        """Return its axes that vary, the one that grows under the name `past`."""
        names = {BATCH: BATCH, PAST: past}
        return {axis: names[size] for axis, size in enumerate(self.shape) if isinstance(size, str)}


class Carried:
    """A model with the states that it carries, as a function of tensors alone.

    Attributes:
        states: In the order of the layers.
        inputs: The names of what the model takes besides its states.
        vocabulary: How many logits there are for each token.
    """

    def __init__(self, model: nn.Module) -> None:
        """Run the model three times to find its states; its weights do not matter.

        Raises:
            StageError: unsupported_architecture, for a model that carries none or unlike ones.
        """
        takes = inspect.signature(model.forward).parameters
        self.model = model
        self.inputs = ["input_ids"]
        self.inputs += [name for name in ("attention_mask", "position_ids") if name in takes]
        self._argument, own = self._own_cache(takes)
        self._makes = _full_cache(model, own)
        self._template = self._run(TEXTS, TOKENS)
        self.states = _states(
            self._template, self._run(MORE_TEXTS, TOKENS), self._run(TEXTS, MORE_TOKENS)
        )
        if not self.states:
            raise _without_cache(model)
        if not any(PAST in state.shape for state in self.states):
            # Nothing then tells how many tokens there were, so a mask could not be of all of them.
            self.inputs = [name for name in self.inputs if name != "attention_mask"]
        layers = getattr(self._template, "layers", [])
        self._plain = type(self._template) is DynamicCache and all(
            type(layer) is DynamicLayer for layer in layers
        )

    def _own_cache(self, takes: Any) -> tuple[str, Any]:
        """Return the cache that the model makes by itself, and the name of its argument."""
        out = self.model(**self.example(TEXTS, 0, TOKENS), use_cache=True)
        self.vocabulary = out.logits.shape[-1]
        for name, value in out.items():
            if name in takes and name not in self.inputs and list(_tensors(value)):
                return name, value
        raise _without_cache(self.model)

    def _run(self, texts: int, tokens: int) -> Any:
        """Return the cache after a first pass over so many tokens."""
        arguments = self.example(texts, 0, tokens)
        if self._makes is not None:
            arguments[self._argument] = self._makes()
        return self.model(**arguments, use_cache=True)[self._argument]

    def example(self, texts: int, past: int, tokens: int) -> dict[str, Any]:
        """Return inputs of the same token, for texts of `past` earlier tokens."""
        positions = torch.arange(past, past + tokens)
        inputs = {
            "input_ids": torch.ones(texts, tokens, dtype=torch.int64),
            "attention_mask": torch.ones(texts, past + tokens, dtype=torch.int64),
            "position_ids": positions.expand(texts, tokens).contiguous(),
        }
        return {name: inputs[name] for name in self.inputs}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters and stored buffers, a shared one under all of its names."""
        found: dict[str, torch.Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        for prefix, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
        return found

    def call(
        self, inputs: dict[str, torch.Tensor], past: list[torch.Tensor] | tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Return logits [texts, tokens, vocabulary] and the states after these tokens."""
        cache = self._cache(past)
        out = self.model(**inputs, **{self._argument: cache}, use_cache=True)
        after = dict(_tensors(out[self._argument]))
        return (out.logits, *(after[state.place] for state in self.states))

    def _cache(self, past: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> Any:
        """Return transformers' own cache with these states."""
        if self._plain:
            # Without the configuration, so that it keeps all positions. One made with it would cut
            # those of layers with a window, each to another length.
            cache = DynamicCache()
            pairs = zip(self.states[::2], past[::2], past[1::2], strict=True)
            for state, keys, values in pairs:
                cache.update(keys, values, state.place[1])
            return cache
        found = dict(_tensors(self._template))
        # `deepcopy` takes what the memo has for an object in place of a copy of it.
        memo = {
            id(found[state.place]): value for state, value in zip(self.states, past, strict=True)
        }
        return copy.deepcopy(self._template, memo)


def _full_cache(model: Any, own: Any) -> Any:
    """Return a maker of empty caches that keep all positions; None where only the model has one."""
    if type(own) is not DynamicCache:
        return None

    def make() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        cache.layers = [_full_layer(layer) for layer in cache.layers]
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        return DynamicCache() if plain else cache

    return make


def _full_layer(layer: Any) -> Any:
    """Return a layer that keeps what one with a window would drop; the mask hides it."""
    if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer


def _tensors(value: Any, place: Place = (), seen: frozenset[int] = frozenset()) -> Iterator:
    """Yield (place, tensor) of all tensors in an object, in order."""
    if isinstance(value, torch.Tensor):
        yield place, value
        return
    if id(value) in seen:
        return
    seen = seen | {id(value)}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        items = list(vars(value).items())
    else:
        return
    for name, item in items:
        yield from _tensors(item, (*place, name), seen)


def _states(one: Any, of_more_texts: Any, of_more_tokens: Any) -> list[State]:
    """Compare what three passes left behind."""
    wider = dict(_tensors(of_more_texts))
    longer = dict(_tensors(of_more_tokens))
    found = []
    for place, tensor in _tensors(one):
        shape: list[int | str] = []
        sizes = zip(tensor.shape, wider[place].shape, longer[place].shape, strict=True)
        for size, of_texts, of_tokens in sizes:
            if of_texts != size:
                shape.append(BATCH)
            elif of_tokens != size:
                shape.append(PAST)
            else:
                shape.append(size)
        if BATCH in shape:  # else it is a constant
            found.append((place, tuple(shape), tensor.dtype))
    return [
        State(*_names(place, [other for other, _, _ in found]), place, shape, dtype)
        for place, shape, dtype in sorted(found, key=lambda one: _layer(one[0]))
    ]


def _layer(place: Place) -> int:
    """Return the layer that a tensor belongs to: the first number on the way to it."""
    return next((step for step in place if isinstance(step, int)), 0)


def _names(place: Place, places: list[Place]) -> tuple[str, str]:
    """Return what a state is called among inputs and outputs."""
    numbers = [step for step in place if isinstance(step, int)]
    kind = [step for step in place if isinstance(step, str)][-1]
    if kind in KEY_VALUE:
        name = f"{numbers[0]}.{KEY_VALUE[kind]}"
        return f"past_key_values.{name}", f"present.{name}"
    kind = kind.removesuffix("_states").removesuffix("_state")
    several = [other for other in places if other[:-1] == place[:-1]]
    more = numbers[1:] if len(several) > 1 else []
    name = ".".join(str(part) for part in (*numbers[:1], kind, *more))
    return f"past_states.{name}", f"present_states.{name}"


def _without_cache(model: nn.Module) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected a model that returns what it carries from token to token, found none in what "
        f"{type(model).__name__} returns; choose format safetensors",
    )
