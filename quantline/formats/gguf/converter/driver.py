"""What runs llama.cpp's converter: a script of its own process, which imports nothing of quantline.

driver.py <convert_hf_to_gguf.py> <given.json> <arguments of the script ...>

The converter is written for the configurations that models are published with, for tokenizers that
it knows by a hash, and for checkpoints that have all that their class may have. Here it is given a
configuration under every name that it may ask for, the vocabulary that quantline has made, and the
tensors that belong to the model. A script without the package `conversion`, of an older llama.cpp
or another project, runs as it is.

given.json has `vocabulary` (a GGUF file with the tokenizer's fields, or null), `renamed` (tensor in
the files → its name, or null where it is left out), `without_draft` (whether the checkpoint has no
layers that draft tokens), and `taken_for` (a file for the class that the model was taken for, if
that is not its own).
"""

import ast
import inspect
import json
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

# What configurations have called the same size. A name is looked up here only when the converter
# would end for the lack of it.
SYNONYMS = (
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    ("original_max_position_embeddings", "max_position_embeddings"),
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
GLOBAL_HEAD_DIM = "global_head_dim"
BY_LAYER = "per_layer_config"  # what differs between layers
ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


# What kinds of layers are called in the files of models, and since transformers 5 by it.
OLDER_KINDS = {"full_attention": "attention", "linear_attention": "mamba"}


class LayerKind(str):
    """The kind of a layer, equal to its older name as well."""

    def __eq__(self, other: object) -> bool:
        return str(self) == other or (
            isinstance(other, str) and OLDER_KINDS.get(str(self)) == str(other)
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


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
        """Return the value of a key.

        An epsilon is found under its other names too, and the size of heads with a global reach
        under that of all, where there is no other.
        """
        if key in self:
            return super().get(key, default)
        if key in EPSILON and default is not None:
            return next((self[name] for name in EPSILON if name in self), default)
        if key == GLOBAL_HEAD_DIM and default is None and not super().get(BY_LAYER):
            return super().get("head_dim")
        return default


def completed(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """Add the names by which transformers and older files call what a configuration has.

    Args:
        values: The configuration, as transformers reads it.
        config: The same as transformers' object; None for one that it does not know.
    """
    values = dict(values)
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and all(isinstance(name, str) for name in kinds):
        values["layer_types"] = [LayerKind(name) for name in kinds]
    for old, new in (getattr(type(config), "attribute_map", None) or {}).items():
        for name, other in ((old, new), (new, old)):
            if values.get(name) is None and values.get(other) is not None:
                values[name] = values[other]
    _spell_rope(values)
    if values.get("dtype") is not None:
        values.setdefault("torch_dtype", values["dtype"])
    _count_dense_blocks(values)
    for name, value in values.items():
        # A configuration may refuse to name one value of what differs from layer to layer.
        inner = getattr(config, name, None) if isinstance(value, dict) else None
        if hasattr(inner, "to_dict"):
            values[name] = Configuration(completed(value, inner))
    return values


def _count_dense_blocks(values: dict[str, Any]) -> None:
    """Say how many blocks come before those with experts, which files say instead of a list.

    Where both are there, transformers goes by the list.
    """
    kinds = values.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return
    dense = next((place for place, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if "dense" not in kinds[dense:]:
        values["first_k_dense_replace"] = dense


def _spell_rope(values: dict[str, Any]) -> None:
    """Add to a configuration what files said of its rotary embedding before transformers 5."""
    rope = _with_share(values.get("rope_parameters") or {})
    if rope:
        values["rope_parameters"] = rope
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


def _with_share(rope: dict[str, Any]) -> dict[str, Any]:
    """Say in the parameters of a rotary embedding that heads are rotated whole, where none says.

    That is what transformers takes for granted, and converters something else.
    """
    shared = dict(rope)
    kinds = [kind for kind, inner in rope.items() if isinstance(inner, dict)]
    for kind in kinds:
        shared[kind] = _with_share(rope[kind])
    if rope and not kinds and rope.get("partial_rotary_factor") is None:
        shared["partial_rotary_factor"] = 1.0
    return shared


def read_configuration(folder: Path) -> dict[str, Any]:
    """Return what config.json says, with transformers' defaults, under all names."""
    from transformers import AutoConfig

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return completed(stored | config.to_dict(), config)


def ancestors(name: str) -> list[str]:
    """Return a class of transformers and those that it derives from, by its own sources.

    A model's modelling file stands by itself, but the modular file that it is made of says which
    class of another model it was derived from.
    """
    import transformers

    found = [name]
    while hasattr(transformers, found[-1]):
        path = Path(inspect.getfile(getattr(transformers, found[-1])))
        modular = path.with_name(path.name.replace("modeling_", "modular_"))
        bases = _bases(modular, found[-1]) if modular.is_file() else []
        bases = [base for base in bases if hasattr(transformers, base) and base not in found]
        if not bases:
            break
        found.append(bases[0])
    return found


def _bases(path: Path, name: str) -> list[str]:
    """Return the names of the classes that a class of a file derives from."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [base.id for base in node.bases if isinstance(base, ast.Name)]
    return []


def known_class(name: str, known: Iterable[str]) -> str:
    """Return the name by which a converter may know a class of transformers.

    It is the same but for its case, or that of the class that it derives from: whether that is the
    same model shows in its logits. Where there is none, the name stays.
    """
    by_case = {other.lower(): other for other in known}
    if name in by_case.values():
        return name
    for ancestor in ancestors(name):
        if ancestor.lower() in by_case:
            return by_case[ancestor.lower()]
    return name


def _all_subclasses(parent: Any) -> list[Any]:
    """Return all classes that derive from one, with it."""
    found = [parent]
    for child in parent.__subclasses__():
        found += _all_subclasses(child)
    return found


def adapt(
    base: ModuleType, conversion: ModuleType, given: dict[str, Any], notes: list[str]
) -> None:
    """Give the converter's classes what quantline knows.

    Args:
        base: The module conversion.base.
        conversion: The package.
        given: The content of given.json.
        notes: Takes sentences on what was given that the converter did not ask for.
    """
    model = base.ModelBase

    def load_hparams(folder: Path, *_: Any, **__: Any) -> dict[str, Any]:
        values = read_configuration(Path(folder))
        known = getattr(conversion, "TEXT_MODEL_MAP", None)
        if known and values.get("architectures"):
            first, *others = values["architectures"]
            taken = known_class(first, known)
            values["architectures"] = [taken, *others]
            if taken.lower() != first.lower():
                Path(given["taken_for"]).write_text(taken, encoding="utf-8")
                notes.append(f"it was taken for {taken}, which {first} derives from")
        return Configuration(values)

    def set_hparams(self: Any, values: dict[str, Any]) -> None:
        # Some classes read config.json by themselves.
        self.__dict__["_hparams"] = Configuration(completed(values, None))

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
        # Some classes hand their work to one of others, which came with them.
        for child in _all_subclasses(base.TextModel):
            if given["vocabulary"] and "set_vocab" in vars(child):
                child.set_vocab = set_vocab
            if given["without_draft"] and getattr(child, "supports_mtp_export", False):
                child.no_mtp = True
        return found

    model.load_hparams = staticmethod(load_hparams)
    model.hparams = property(lambda self: self.__dict__["_hparams"], set_hparams)
    model.find_hparam = find_hparam
    model.index_tensors = index_tensors
    conversion.get_model_class = get_model_class  # type: ignore[attr-defined]


def main() -> None:
    """Run the script that the first argument names."""
    script = Path(sys.argv[1])
    notes: list[str] = []
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    # In place of this file's own folder, whose modules are none of the script's.
    sys.path[0] = str(script.parent)
    if (script.parent / "conversion/base.py").is_file():
        sys.path.insert(1, str(script.parent / "gguf-py"))
        import conversion
        from conversion import base

        adapt(base, conversion, given, notes)
    sys.argv = [str(script), *sys.argv[3:]]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit) as error:
        ended_well = isinstance(error, SystemExit) and error.code in (None, 0)
        if ended_well or not notes:
            raise
        # The notes last, where an error quotes them.
        raise SystemExit("\n".join([traceback.format_exc(), *notes])) from None


if __name__ == "__main__":
    main()
