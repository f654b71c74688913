"""The structure of models without a table, found in what transformers builds."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from quantline.errors import Failure, StageError
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.model.structure import Structure, read_structure, write_structure
from tests.helpers.granite import MULTIPLIERS
from tests.helpers.tensor_files import change_tensors, read_tensors, write_tensors

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
EXPERTS = {"tie_word_embeddings": False, **SIZES}
KINDS = {
    "olmo2": SIZES,
    "stablelm": {**SIZES, "tie_word_embeddings": False},
    "granite": MULTIPLIERS,
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **EXPERTS,
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"qk_rope_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "num_key_value_heads": 4,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model):
    """Return a function that makes a model once."""
    made = {}

    def folder_of(kind: str):
        if kind not in made:
            path = tmp_path_factory.mktemp("found") / kind
            made[kind] = make_model(path, kind, **KINDS[kind])
        return made[kind]

    return folder_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_all_that_transformers_loads(kind, folders):
    """Every parameter and stored buffer, to the bit, under names of which none is lost."""
    checkpoint = Checkpoint(folders(kind))
    structure = checkpoint.structure
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    loaded = sum(
        tensor.numel() for tensor in {id(t): t for t in model.state_dict().values()}.values()
    )
    tied = structure.head == structure.embedding
    loaded -= model.get_output_embeddings().weight.numel() if tied else 0
    assert loaded == sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names)
    for name, place in structure.tensors.items():
        if place.view is None and place.paths[0] in model.state_dict():
            expected = model.state_dict()[place.paths[0]]
            found = torch.from_numpy(checkpoint.number(name))
            assert torch.equal(found, expected.to(found.dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_check_blocks_finds_the_model_to_run_block_by_block(kind, folders):
    checkpoint = Checkpoint(folders(kind))
    structure = verify.check_blocks(checkpoint)
    assert structure.returns == (0,) * 2
    for block, groups in zip(structure.linears, structure.inputs, strict=True):
        assert sorted(name for group in groups for name in group.linears) == sorted(block)
    if kind == "granite":
        assert structure.logit_scale == pytest.approx(1 / MULTIPLIERS["logits_scaling"])


def test_experts_that_a_file_holds_in_one_tensor_are_layers_of_their_own(folders):
    checkpoint = Checkpoint(folders("gpt_oss"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    start = "model.layers.1.mlp.experts.2"
    assert f"{start}.up_proj" in checkpoint.arch.linears_of(1)
    up = checkpoint.tensor(f"{start}.up_proj.weight")
    assert np.array_equal(up, experts.gate_up_proj[2].T[1::2].detach().numpy())
    bias = checkpoint.tensor(f"{start}.gate_proj.bias")
    assert np.array_equal(bias, experts.gate_up_proj_bias[2][::2].detach().numpy())
    assert checkpoint.arch.layer_index(f"{start}.down_proj.weight") == 1
    routers = [name for name in checkpoint.names if ".router." in name]
    assert routers
    assert not any(name.removesuffix(".weight") in checkpoint.arch.linears() for name in routers)


def test_structure_is_kept_beside_its_config(folders, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders("olmo2"), folder)
    structure = verify.check_blocks(Checkpoint(folder))
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    write_structure(folder, structure)
    assert read_structure(folder) == structure
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": "another one"}))
    assert read_structure(folder) is None


def test_a_router_bias_that_is_left_out_is_missed(folders, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders("deepseek_v3"), folder)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_tensors(folder, lambda key, tensor: None if key == name else tensor)
    with pytest.raises(StageError, match=name) as caught:
        Checkpoint(folder)
    assert caught.value.failure == Failure.MISSING_SHARD


def test_tensors_of_nothing_are_refused_and_those_left_out_on_purpose_pass(folders, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders("deepseek_v3"), folder)
    ignored = "model.layers.61.eh_proj.weight"  # transformers' class leaves this layer out
    values = np.ones((4, 4), np.float32)
    write_tensors(folder / "model.safetensors", read_tensors(folder) | {ignored: values})
    checkpoint = Checkpoint(folder)
    assert checkpoint.passed == (ignored,)
    assert np.array_equal(checkpoint.raw(ignored), values)
    assert ignored not in checkpoint.names
    strange = "model.layers.1.mlp.gate.strange"
    write_tensors(folder / "model.safetensors", read_tensors(folder) | {strange: values})
    with pytest.raises(StageError, match=strange) as caught:
        Checkpoint(folder)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_a_model_that_was_saved_inside_of_something_is_refused_by_that_name(folders, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders("olmo2"), folder)
    tensors = {f"_orig_mod.{key}": tensor for key, tensor in read_tensors(folder).items()}
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(StageError, match="whose names begin with '_orig_mod'") as caught:
        Checkpoint(folder)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_blocks_that_load_has_not_run_are_not_run_by_others(folders):
    from quantline.model.block_runner import BlockRun

    with pytest.raises(StageError, match="run load again"):
        BlockRun(Checkpoint(folders("olmo2")), np.zeros((1, 4), np.int32))


def test_check_blocks_takes_no_lack_of_memory_for_a_model_that_does_not_run(folders, monkeypatch):
    def allocate(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr("quantline.model.whole_model.WholeModel.run", allocate)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        verify.check_blocks(Checkpoint(folders("olmo2")))


def test_check_blocks_refuses_a_model_whose_tokens_see_later_ones(folders, monkeypatch):
    from transformers.models.olmo2 import modeling_olmo2

    monkeypatch.setattr(
        modeling_olmo2, "create_causal_mask", lambda **kwargs: torch.zeros(1, 1, 1, 1)
    )
    with pytest.raises(StageError, match="to be causal") as caught:
        verify.check_blocks(Checkpoint(folders("olmo2")))
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_check_blocks_notices_blocks_that_compute_something_else(folders, monkeypatch):
    from quantline.model.block_calls import Call

    run = Call.run
    monkeypatch.setattr(Call, "run", lambda self, block, states: run(self, block, states) * 1.001)
    with pytest.raises(StageError, match="the same logits block by block"):
        verify.check_blocks(Checkpoint(folders("olmo2")))


def test_experts_that_nobody_takes_apart_are_not_passed_over(folders, monkeypatch, tmp_path):
    """A model of a form that is not known enters, and no recipe leaves its experts as they are."""
    from quantline.config.recipes import parse_recipe
    from quantline.recipes.quantize import check_taken_apart

    monkeypatch.setattr("quantline.model.fused_experts._by_protocol", lambda *given: None)
    checkpoint = Checkpoint(folders("gpt_oss"))
    assert verify.check_blocks(checkpoint).unsplit
    rtn = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
    with pytest.raises(StageError, match="experts of gpt_oss in a form") as caught:
        check_taken_apart(parse_recipe(rtn), checkpoint.arch)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    check_taken_apart(parse_recipe({"method": "none"}), checkpoint.arch)
    assert not Checkpoint(folders("granite")).structure.unsplit


def test_experts_beyond_those_of_config_json_are_refused(folders, tmp_path):
    """transformers joins all that it finds; its model would end while it runs."""
    folder = shutil.copytree(folders("olmoe"), tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        tensors[name.replace("layers.0.mlp.experts.3.", "layers.0.mlp.experts.4.")] = tensors[name]
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(StageError, match=r"found .*experts\.4\.down_proj") as caught:
        Checkpoint(folder)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
