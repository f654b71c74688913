"""What runs llama.cpp's converter: a script of its own process, which imports nothing of quantline.

driver.py <convert_hf_to_gguf.py> <given.json> <arguments of the script ...>

The converter is written for the configurations that models are published with, for tokenizers that
it knows by a hash, and for checkpoints that have all that their class may have. Here it is given a
configuration under every name that it may ask for, the vocabulary that quantline has made, and the
tensors that belong to the model. A script without the package `conversion`, of an older llama.cpp
or another project, runs as it is.

given.json has `vocabulary` (a GGUF file with the tokenizer's fields, or null), `renamed` (tensor in
the files → its name, or null where it is left out), and `without_draft` (whether the checkpoint has
no layers that draft tokens).
"""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# What configurations have called the same size. A name is looked up here only when the converter
# would end for the lack of it.
SYNONYMS = (
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    ("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_percent", "rotary_percent"),
    ("rope_theta", "rotary_emb_base", "rope_base"),
    ("hidden_size", "n_embd", "d_model", "dim"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "n_head_kv", "num_kv_heads", "kv_n_heads", "num_attention_heads"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "num_experts_per_token"),
    ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "rms_norm_eps"),
    ("rms_norm_eps", "layernorm_epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("hidden_act", "hidden_activation", "activation_function"),
)
# Of these a converter takes a default of its own where it does not find the name.
EPSILON = ("layernorm_epsilon", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


class Configuration(dict[str, Any]):
    """A configuration in which a name that is missing is looked for under other ones."""

    def __missing__(self, key: str) -> Any:
        for names in SYNONYMS:
            if key in names:
                for name in names:
                    if self.get(name) is not None:
                        return self[name]
        if key == "head_dim":
            return self["hidden_size"] // self["num_attention_heads"]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; an epsilon also under its other names."""
        if key in self or key not in EPSILON or default is None:
            return super().get(key, default)
        return next((self[name] for name in EPSILON if name in self), default)


def completed(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """Add the names by which transformers and older files call what a configuration has.

    Args:
        values: The configuration, as transformers reads it.
        config: The same as transformers' object; None for one that it does not know.
    """
    values = dict(values)
    for old, new in (getattr(type(config), "attribute_map", None) or {}).items():
        for name, other in ((old, new), (new, old)):
            if values.get(name) is None and values.get(other) is not None:
                values[name] = values[other]
    rope = values.get("rope_parameters") or {}
    if "full_attention" in rope:  # one for each kind of layer
        local = rope.get("sliding_attention") or {}
        if local.get("rope_theta") is not None:
            values.setdefault("rope_local_base_freq", local["rope_theta"])
        rope = rope["full_attention"] or {}
    for key in ROPE:
        if rope.get(key) is not None and values.get(key) is None:
            values[key] = rope[key]
    kind = rope.get("rope_type")
    if kind not in (None, "default") and values.get("rope_scaling") is None:
        values["rope_scaling"] = rope | {"type": kind}
    if values.get("dtype") is not None:
        values.setdefault("torch_dtype", values["dtype"])
    for name, value in values.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            values[name] = Configuration(completed(value, inner))
    return values


def read_configuration(folder: Path) -> dict[str, Any]:
    """Return what config.json says, with transformers' defaults, under all names."""
    from transformers import AutoConfig

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return completed(stored | config.to_dict(), config)


def adapt(base: ModuleType, conversion: ModuleType, given: dict[str, Any]) -> None:
    """Give the converter's classes what quantline knows.

    Args:
        base: The module conversion.base.
        conversion: The package.
        given: The content of given.json.
    """
    model = base.ModelBase

    def load_hparams(folder: Path, *_: Any, **__: Any) -> dict[str, Any]:
        return Configuration(read_configuration(Path(folder)))

    def set_hparams(self: Any, values: dict[str, Any]) -> None:
        self.__dict__["_hparams"] = Configuration(values)

    find_in_order = model.find_hparam

    def find_hparam(self: Any, keys: Any, optional: bool = False) -> Any:
        keys = list(keys)
        try:
            return find_in_order(self, keys, optional)
        except KeyError:
            for key in keys:
                try:
                    return self.hparams[key]
                except KeyError:
                    continue
            raise

    index_all = model.index_tensors

    def index_tensors(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        tensors = {}
        for name, read in index_all(self, *args, **kwargs).items():
            own = given["renamed"].get(name, name)
            if own is not None:
                tensors[own] = read
        return tensors

    def set_vocab(self: Any) -> None:
        import gguf

        for key, field in gguf.GGUFReader(given["vocabulary"]).fields.items():
            if key.startswith("tokenizer."):
                is_array = field.types[0] == gguf.GGUFValueType.ARRAY
                item_type = field.types[-1] if is_array else None
                self.gguf_writer.add_key_value(
                    key, field.contents(), field.types[0], sub_type=item_type
                )

    class_of = conversion.get_model_class

    def get_model_class(name: str, mmproj: bool = False) -> Any:
        found = class_of(name, mmproj=mmproj)
        if given["vocabulary"] and not mmproj:
            found.set_vocab = set_vocab
        if given["without_draft"] and getattr(found, "supports_mtp_export", False):
            found.no_mtp = True
        return found

    model.load_hparams = staticmethod(load_hparams)
    model.hparams = property(lambda self: self.__dict__["_hparams"], set_hparams)
    model.find_hparam = find_hparam
    model.index_tensors = index_tensors
    conversion.get_model_class = get_model_class  # type: ignore[attr-defined]


def main() -> None:
    """Run the script that the first argument names."""
    script = Path(sys.argv[1])
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    # In place of this file's own folder, whose modules are none of the script's.
    sys.path[0] = str(script.parent)
    if (script.parent / "conversion/base.py").is_file():
        sys.path.insert(1, str(script.parent / "gguf-py"))
        import conversion
        from conversion import base

        adapt(base, conversion, given)
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
