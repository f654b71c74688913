"""A tiny configuration of any model: what its class says by default, with small sizes."""

import inspect
from itertools import zip_longest
from typing import Any

from benchmarks.models.tiny_sizes import (
    DEPTHS,
    DROPOUTS,
    IN_TURN,
    INITIALIZER_RANGE,
    LATENT,
    LAYERS_OF_KINDS,
    MOST_LAYERS,
    OVERRIDES,
    TEXT,
    TOWER,
)

OF_TOKENS = ("_token_id", "_token_index", "_token_idx", "_patch_id")  # how their names end
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
ENDS += ("forced_eos_token_id", "forced_bos_token_id", "cls_token_id", "unk_token_id")


def tiny_config(model_type: str, vocabulary: int, options: dict[str, Any] | None) -> Any:
    """Return a configuration of a type with small sizes.

    Args:
        model_type: As in config.json.
        vocabulary: How many tokens the tokenizer has.
        options: Of the configuration; they go before all else.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return cls(**TinyConfig(cls, vocabulary).values() | (options or {}))


class TinyConfig:
    """The values that make a configuration tiny.

    Attributes:
        cls: The configuration's class.
        base: What it is by default.
        is_text: Whether it is that of a language model, or has one as its part.
    """

    def __init__(self, cls: Any, vocabulary: int, is_text: bool = True) -> None:
        """Take the class."""
        self.cls = cls
        self.vocabulary = vocabulary
        self.is_text = is_text
        self.base = cls()
        self.defaults = self.base.to_dict()
        self._named = {*self.defaults, *inspect.signature(cls.__init__).parameters}
        self._named -= set(cls.attribute_map)  # another name for one that is there

    def values(self) -> dict[str, Any]:
        """Return what the class is to be called with."""
        values = self._sizes()
        values |= self._special_tokens()
        values |= self._parts()
        values |= self._lists_per_layer(values)
        values |= OVERRIDES.get(self.cls.model_type, {})
        self._fit_rope(values)
        return values

    def _sizes(self) -> dict[str, Any]:
        table = TEXT if self.is_text else TOWER
        values = {name: size for name, size in table.items() if name in self._named}
        if "qk_rope_head_dim" in self._named:
            values |= {name: size for name, size in LATENT.items() if name in self._named}
            values.pop("head_dim", None)  # it follows from the others
        for name, value in self.defaults.items():
            if isinstance(value, float) and any(word in name for word in DROPOUTS):
                values[name] = 0.0
        if "initializer_range" in self._named:
            values["initializer_range"] = INITIALIZER_RANGE
        for name, size in list(values.items()):
            if isinstance(self.defaults.get(name), list | tuple):
                values |= self._several_sizes(name, size)
                if not self.is_text:
                    del values[name]  # its parts have widths of their own, which hang together
        return values

    def _several_sizes(self, name: str, size: Any) -> dict[str, Any]:
        """Return a size that a configuration has more than once, or once a layer."""
        depth, count = self._depth()
        if len(self.defaults[name]) != depth:
            count = len(self.defaults[name])
        return {name: [size] * count}

    def _special_tokens(self) -> dict[str, Any]:
        """Return the vocabulary's size, and tokens of which only the ends occur in texts."""
        values: dict[str, Any] = {}
        placeholder = self.vocabulary
        for name, value in self.defaults.items():
            if name in ENDS:
                values[name] = 0
            elif name.endswith(OF_TOKENS) and isinstance(value, int):
                placeholder -= 1
                values[name] = placeholder
            elif name.startswith("vocab_size") and self.is_text:
                values[name] = self.vocabulary
        return values

    def _parts(self) -> dict[str, Any]:
        """Return the configurations that it consists of."""
        text = self.base.get_text_config(decoder=True) if self.is_text else None
        values = {}
        for name in self.cls.sub_configs:
            part = getattr(self.base, name, None)
            if part is None:
                continue
            of_text = self.is_text and (part is text or part.get_text_config() is text)
            made = TinyConfig(type(part), self.vocabulary, of_text).values()
            values[name] = {"model_type": part.model_type, **made}
        return values

    def _depth(self) -> tuple[int, int]:
        """Return the number of layers by default, and the tiny one."""
        table = TEXT if self.is_text else TOWER
        depth = next((self.defaults[name] for name in DEPTHS if name in self.defaults), 0)
        return depth, len(self._chosen_layers()) or table[DEPTHS[0]]

    def _chosen_layers(self) -> list[int]:
        """Return the layers by default that the tiny model has; none if all are alike.

        They are the first ones, in whose order some programs know them, if every kind is among
        them; else the first of each kind, then the second of each, and so on.
        """
        layers_of = self._kinds().values()
        if len(layers_of) < 2:
            return []
        count = max(LAYERS_OF_KINDS, 1 + max(layers[0] for layers in layers_of))
        if count <= MOST_LAYERS and self.cls.model_type not in IN_TURN:
            return list(range(count))
        turns = zip_longest(*layers_of)
        in_turn = [layer for turn in turns for layer in turn if layer is not None]
        return in_turn[:LAYERS_OF_KINDS]

    def _kinds(self) -> dict[str, list[int]]:
        """Return kind of layer → the layers of that kind by default."""
        layers_of: dict[str, list[int]] = {}
        lists = self._lists().values()
        for layer, kind in enumerate(zip(*lists, strict=True)):
            layers_of.setdefault(str(kind), []).append(layer)
        return layers_of

    def _lists(self) -> dict[str, list[Any]]:
        """Return the lists that have one entry a layer by default."""
        depths = {self.defaults[name] for name in DEPTHS if name in self.defaults}
        return {
            name: value
            for name, value in self.defaults.items()
            if isinstance(value, list) and len(value) > 1 and len(value) in depths
            # What a tower has as often as layers may be something else.
            if self.is_text or isinstance(value[0], str)
        }

    def _lists_per_layer(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return lists of one entry a layer, with each kind of layer that there is by default."""
        lists = self._lists()
        if not lists:
            return {}
        chosen = self._chosen_layers() or list(range(self._depth()[1]))
        count = len(chosen)
        made = {name: [value[layer] for layer in chosen] for name, value in lists.items()}
        depths = {name: count for name in DEPTHS if name in values}
        return depths | {name: value for name, value in made.items() if name not in values}

    def _fit_rope(self, values: dict[str, Any]) -> None:
        """Fit the parts of a rotary embedding of several axes to the head's width."""
        rope = values.get("rope_parameters", self.defaults.get("rope_parameters"))
        if not isinstance(rope, dict) or "mrope_section" not in rope:
            return
        section = rope["mrope_section"]
        half = values.get("head_dim", 64) * rope.get("partial_rotary_factor", 1.0) / 2
        shares = [int(half * one / sum(section)) for one in section]
        shares[0] += int(half) - sum(shares)
        values["rope_parameters"] = rope | {"mrope_section": shares}
