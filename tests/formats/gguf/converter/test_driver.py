"""What the converter is given in place of what it would find by itself."""

import json
from pathlib import Path

import gguf
import pytest
from transformers import AutoConfig

from quantline.formats.gguf.converter import driver
from quantline.formats.gguf.converter.script import run_script

# A converter with the frame of llama.cpp's: what it finds, it writes down.
BASE = """
import json
from pathlib import Path

class ModelBase:
    @staticmethod
    def load_hparams(folder, is_mistral_format):
        raise ValueError("a configuration that transformers 5 has saved")

    def find_hparam(self, keys, optional=False):
        key = next((key for key in keys if key in self.hparams), None)
        if key is not None:
            return self.hparams[key]
        if optional:
            return None
        raise KeyError(keys)

    def index_tensors(self):
        return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}

class TextModel(ModelBase):
    supports_mtp_export = True
    no_mtp = False

    def set_vocab(self):
        raise NotImplementedError("an unknown hash")
"""
PACKAGE = """
def get_model_class(name, mmproj=False):
    from conversion.base import TextModel
    return TextModel
"""
SCRIPT = """
import sys
import json
from pathlib import Path
import gguf
from conversion import get_model_class
from conversion.base import ModelBase

class Writer:
    found = {}
    def add_key_value(self, key, value, kind, sub_type=None):
        self.found[key] = value

model_class = get_model_class("LlamaForCausalLM")
model = model_class()
model.gguf_writer = Writer()
model.hparams = ModelBase.load_hparams(Path(sys.argv[1]), False)
model.set_vocab()
Path(sys.argv[3]).write_text(json.dumps({
    "vocabulary": sorted(Writer.found), "no_mtp": model_class.no_mtp,
    "tensors": model.index_tensors(), "n_ctx": model.find_hparam(["n_ctx"]),
    "rotary_pct": model.hparams["rotary_pct"], "rope_theta": model.hparams["rope_theta"],
    "absent": model.find_hparam(["nothing"], optional=True), "options": sys.argv[4:],
}))
"""


@pytest.fixture
def script(tmp_path) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion/__init__.py").write_text(PACKAGE)
    (folder / "conversion/base.py").write_text(BASE)
    (folder / "convert.py").write_text(SCRIPT)
    return folder / "convert.py"


def test_driver_gives_a_converter_what_quantline_knows(script, tmp_path):
    vocabulary = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(vocabulary, "vocabulary")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500}
    (model / "config.json").write_text(json.dumps(AutoConfig.for_model(**config).to_dict()))
    given = tmp_path / "given.json"
    renamed = {"lm_head.weight": None, "model.embed_tokens.weight": "embed.weight"}
    words = {
        "vocabulary": str(vocabulary),
        "renamed": renamed,
        "without_draft": True,
        "taken_for": str(tmp_path / "class"),
    }
    given.write_text(json.dumps(words))
    output = tmp_path / "output"
    run_script(script, given, model, output, ["--outtype", "f32"])
    assert json.loads(output.read_text()) == {
        "vocabulary": ["tokenizer.ggml.model", "tokenizer.ggml.tokens"],
        "no_mtp": True,
        "tensors": {"embed.weight": "embedding"},
        "n_ctx": 2048,
        "rotary_pct": 0.5,
        "rope_theta": 500,
        "absent": None,
        "options": ["--outtype", "f32"],
    }


def test_configuration_looks_for_a_missing_name_under_others():
    values = driver.Configuration(n_embd=64, num_attention_heads=4, rms_norm_eps=1e-7)
    assert values["hidden_size"] == 64
    assert values["head_dim"] == 16
    assert values.get("layernorm_epsilon", 1e-5) == 1e-7
    assert driver.Configuration(head_dim=64).get("global_head_dim") == 64
    assert values.get("hidden_size") is None  # whether a name is there stays what it is
    assert "hidden_size" not in values
    with pytest.raises(KeyError):
        values["vocab_size"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("LlamaForCausalLM", "LlamaForCausalLM"),
        ("CwmForCausalLM", "LlamaForCausalLM"),  # derived from it
        ("PhimoeForCausalLM", "PhiMoEForCausalLM"),  # under another spelling
        ("BloomForCausalLM", "BloomForCausalLM"),  # neither
        ("NoSuchForCausalLM", "NoSuchForCausalLM"),
    ],
)
def test_known_class_is_one_of_the_converters_names(name, known):
    assert driver.known_class(name, ["LlamaForCausalLM", "PhiMoEForCausalLM"]) == known


def test_completed_has_the_names_of_transformers_both_ways():
    config = AutoConfig.for_model("gpt2", n_embd=48, n_layer=3)
    values = driver.completed(config.to_dict(), config)
    assert values["hidden_size"] == values["n_embd"] == 48
    assert values["num_hidden_layers"] == 3


def test_completed_spells_the_rotary_embedding_as_files_did():
    rope_of_llama = {"rope_type": "default", "rope_theta": 1e4}
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "partial_rotary_factor": 0.5}
    values = driver.completed({"rope_parameters": rope, "dtype": "bfloat16"}, None)
    assert values["rope_theta"] == 5e5
    assert values["partial_rotary_factor"] == 0.5
    assert values["rope_scaling"] == rope | {"type": "yarn"}
    assert "partial_rotary_factor" not in rope_of_llama  # transformers rotates heads whole
    values = driver.completed({"rope_parameters": rope_of_llama}, None)
    assert values["rope_parameters"]["partial_rotary_factor"] == 1.0
    values = driver.completed({"rope_parameters": rope, "dtype": "bfloat16"}, None)
    assert values["torch_dtype"] == "bfloat16"
    kinds = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    values = driver.completed({"rope_parameters": kinds}, None)
    assert (values["rope_theta"], values["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in values


def test_completed_counts_the_dense_blocks_before_those_with_experts():
    kinds = ["dense", "dense", "sparse"]
    assert driver.completed({"mlp_layer_types": kinds}, None)["first_k_dense_replace"] == 2
    given = {"mlp_layer_types": kinds, "first_k_dense_replace": 1}
    assert (
        driver.completed(given, None)["first_k_dense_replace"] == 2
    )  # transformers goes by the list
    assert "first_k_dense_replace" not in driver.completed({"mlp_layer_types": kinds[::-1]}, None)


def test_completed_asks_a_configuration_for_its_parts_alone():
    """One whose layers differ refuses to name a size that is not the same in all."""

    class Uneven:
        def __getattribute__(self, name):
            if name == "head_dim":
                raise ValueError(name)
            return object.__getattribute__(self, name)

    assert driver.completed({"head_dim": 64, "hidden_size": 8}, Uneven())["head_dim"] == 64
    values = driver.Configuration({"head_dim": 64, "per_layer_config": {"1": {"head_dim": 512}}})
    assert values.get("global_head_dim") is None
    assert driver.Configuration({"head_dim": 64}).get("global_head_dim") == 64


def test_completed_gives_kinds_of_layers_both_names():
    kinds = ["full_attention", "linear_attention", "sliding_attention"]
    found = driver.completed({"layer_types": list(kinds)}, None)["layer_types"]
    assert found == kinds
    assert found == ["attention", "mamba", "sliding_attention"]
    assert found[0] != "mamba"
    assert "attention" in found
    assert json.dumps(found) == json.dumps(kinds)
