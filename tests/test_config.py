"""conf/ composes to parameters that fit the schema, and what does not fit is told with its key and the valid ones."""

from pathlib import Path

import pytest
import yaml

from quantline.config.compose import as_yaml, compose, load_params, missing_inputs
from quantline.config.section import ConfigError
from quantline.config.validation import validate

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
GIVEN = {"local": ["model.path=some/folder"], "hub": ["model.id=owner/name"]}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> dict:
    return compose(list(overrides), ROOT)


@pytest.mark.parametrize("suite", names("suite"))
def test_every_suite_composes(suite):
    params = validate(composed(f"suite={suite}"))
    assert params.suite == suite
    assert {variant.recipe for variant in params.variants.values()} <= params.recipes.keys()


@pytest.mark.parametrize("model", names("model"))
def test_every_model_composes(model):
    assert validate(composed(f"model={model}", *GIVEN.get(model, []))).model.watch


@pytest.mark.parametrize("target", names("target"))
def test_every_target_composes(target):
    assert validate(composed(f"target={target}")).target.name == target


@pytest.mark.parametrize("text", names("calibration"))
def test_every_calibration_composes(text):
    assert validate(composed(f"calibration={text}", *(["calibration.path=t.txt"] if text == "file" else [])))


@pytest.mark.parametrize("text", names("evaluation"))
def test_every_evaluation_composes(text):
    assert validate(composed(f"evaluation={text}", *(["evaluation.path=t.txt"] if text == "file" else [])))


@pytest.mark.parametrize("group", ["recipe", "variant"])
def test_every_recipe_and_variant_is_in_the_full_suite_or_in_that_of_an_extra(group):
    """A small YAML file that no suite names would never be tried."""
    key = {"recipe": "recipes", "variant": "variants"}[group]
    suites = ("full", "layouts", "genai", "vllm")
    assert sorted({name for suite in suites for name in composed(f"suite={suite}")[key]}) == names(group)


def test_the_default_suite():
    params = validate(composed())
    assert list(params.variants) == ["bf16", "gguf-q4_k_m", "gguf-q4_k_m-curvature", "gguf-q8_0", "awq-w4g128", "gptq-w4g128", "rtn-w4g128",
                                     "onnx-fp32", "onnx-int8", "onnx-int4-gptq"]
    assert params.variants["onnx-int4-gptq"].recipe == params.variants["gptq-w4g128"].recipe


def test_the_committed_parameters_are_what_conf_composes_to():
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == composed()


@pytest.mark.parametrize("overrides", [
    [], ["suite=full"], ["model=local", "model.path=m"], ["model=qwen3-0.6b"], ["calibration=hub"], ["evaluation=hub"],
    ["calibration=file", "calibration.path=t"], ["evaluation=file", "evaluation.path=t"], ["model.adapter=a"]])
def test_dvc_finds_all_that_dvc_yaml_asks_of_params(overrides):
    """Parameters of stages, and `${...}` in their dependencies, exist and are not null in every composition."""
    values, stages = composed(*overrides), yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    asked = [key for stage in stages.values() for key in stage.get("params", [])]
    paths = [one[2:-1] for stage in stages.values() for one in stage.get("deps", []) if one.startswith("${")]
    assert asked and "model.watch" in paths
    for key in [*asked, *paths]:
        found = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]
        assert key in asked or isinstance(found, str), key


def test_one_file_of_text_serves_calibration_and_evaluation():
    params = validate(composed("calibration=file", "calibration.path=t.txt", "evaluation=file",
                               "evaluation.path=t.txt"))
    assert params.calibration.part[1] <= params.evaluation.part[0]
    assert params.evaluation.gold is None and params.evaluation.gold_watch == "t.txt"


def test_gold_and_adapter_are_watched_where_there_are_any():
    params = validate(composed("evaluation.gold=g.jsonl", "model.adapter=lora"))
    assert (params.evaluation.gold_watch, params.model.adapter_watch) == ("g.jsonl", "lora")


@pytest.mark.parametrize("overrides, variants", [
    (["suite=quick", "variant=[bf16]"], ["bf16"]),
    (["suite=quick", "~variants.bf16"], ["gguf-q4_k_m", "rtn-w4g128", "gptq-w4g128"]),
    (["suite=quick", "+variant=[gguf-f16]"], ["bf16", "gguf-q4_k_m", "rtn-w4g128", "gptq-w4g128", "gguf-f16"]),
])
def test_variants_are_chosen_on_the_command_line(overrides, variants):
    assert list(composed(*overrides)["variants"]) == variants


@pytest.mark.parametrize("override, told", [
    ("+recipes.gptq-w4g128.bitts=3", (r"recipes\.gptq-w4g128\.bitts: unknown key \(did you mean bits\?\); valid keys "
                                      r"here are act_order, bits, budget, curvature, damping, group_size, method, ")),
    ("recipes.gptq-w4g128.bitts=3", r"recipes\.gptq-w4g128\.bitts: unknown key \(did you mean bits\?\)"),
    ("model.pth=x", r"model\.pth: unknown key \(did you mean path\?\); valid keys here are .*revision"),
    ("+modle={}", r"modle: unknown key \(did you mean model\?\); valid keys here are calibration, "),
    ("+evaluation.speed.thread=1", r"evaluation\.speed\.thread: unknown key \(did you mean threads\?\)"),
    ("target.gates=[{metric: a, operator: '<=', threshold: 1, must: true}]", r"target\.gates\.0\.must: unknown key"),
    ("recipes.gptq-w4g128.bits=5", r"^recipes\.gptq-w4g128\.bits: .*2, 3, 4 or 8, found 5"),
    ("recipes.gptq-w4g128.group_size=48", r"^recipes\.gptq-w4g128\.group_size: .*found 48"),
    ("recipes.gptq-w4g128.damping=nan", r"^recipes\.gptq-w4g128\.damping: .*finite"),
    ("recipes.gptq-w4g128.method=gtpq", r"recipes\.gptq-w4g128\.method: unknown method 'gtpq' \(did you mean gptq\?\)"),
    ("recipes.q4_k_m.mix=Q4_X", r"recipes\.q4_k_m\.mix: .*Q4_K_M.*found 'Q4_X'"),
    ("+recipes.Upper={method: none}", r"recipes\.Upper: a name has only"),
    ("variants.bf16.recipe=nought", r"variants\.bf16\.recipe: no recipe 'nought' in this suite; there are awq-w4g128"),
    ("variants.bf16.runtime=onnxruntime", r"variants\.bf16\.runtime: safetensors is served by transformers or vllm, found onnxruntime"),
    ("variants.gguf-q4_k_m.recipe=int8", r"variants\.gguf-q4_k_m\.recipe: gguf carries the methods none, kquant"),
    ("variants.bf16.recipe=q4_k_m", r"variants\.bf16\.recipe: safetensors carries the methods none, rtn"),
    ("+variants.gptq-w4g128.dtype=float16", r"variants\.gptq-w4g128\.dtype: only a variant whose recipe"),
    ("+variants.onnx-fp32.dtype=float16", r"variants\.onnx-fp32\.dtype: onnx is exported in float32"),
    ("+variants.bf16.split_max_mib=100", r"variants\.bf16\.split_max_mib: only gguf is split by it, found safetensors"),
    ("+variants.gguf-q4_k_m.split_max_mib=0", r"variants\.gguf-q4_k_m\.split_max_mib: .*greater than 0"),
    ("+recipes.q4_k_m.overrides={attn_v: Q9}", r"recipes\.q4_k_m\.overrides\.attn_v: .*Q8_0.*found 'Q9'"),
    ("evaluation.limits.seconds=0", r"evaluation\.limits\.seconds: .*greater than 0, found 0"),
    ("evaluation.limits.memory_mib=-1", r"evaluation\.limits\.memory_mib: .*greater than 0, found -1"),
    ("+evaluation.limits.memory=1", r"evaluation\.limits\.memory: unknown key \(did you mean memory_mib\?\); valid keys here are memory_mib, seconds"),
    ("+evaluation.pythons.torch=python", r"evaluation\.pythons\.torch: .*'transformers'.*found 'torch'"),
    ("+recipes.q4_k_m.budget={size_mib: 3, bits_per_weight: 4}", r"recipes\.q4_k_m\.budget: expected one limit, found size_mib and"),
    ("+recipes.q4_k_m.budget={size: 3}", r"recipes\.q4_k_m\.budget\.size: unknown key .*valid keys here are bits_per_weight, size_mib, types"),
    ("+recipes.gptq-w4g128.budget={types: [Q4_K]}", r"budget\.types: unknown key.*valid keys here are bits, bits_per_weight, group_sizes, size_mib"),
    ("+recipes.q4_k_m.budget={types: [Q9]}", r"recipes\.q4_k_m\.budget\.types\.0: .*Q8_0.*found 'Q9'"),
    ("+recipes.q4_k_m-curvature.budget={types: [IQ2_XXS]}", r"recipes\.q4_k_m-curvature\.budget\.types\.0: .*found 'IQ2_XXS'"),
    ("+recipes.q4_k_m.budget={types: []}", r"recipes\.q4_k_m\.budget\.types: .*at least 1"),
    ("+recipes.q4_k_m.budget={size_mib: 0}", r"recipes\.q4_k_m\.budget\.size_mib: .*greater than 0"),
    ("+recipes.gptq-w4g128.budget={bits_per_weight: inf}", r"recipes\.gptq-w4g128\.budget\.bits_per_weight: .*finite"),
    ("+recipes.int8.budget={}", r"recipes\.int8\.budget: unknown key"),
    ("calibration.part=[0.6,0.5]", r"calibration: .*0 <= from < to <= 1"),
    ("suite=quik", r"Could not find 'suite/quik'[\s\S]*quick"),
    ("model=local", r"model\.path has no value; give one: model\.path=\.\.\."),
    ("model=hub", r"model\.id has no value"),
])
def test_what_does_not_fit_is_told(override, told):
    with pytest.raises(ConfigError, match=told):
        composed(override)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        composed("recipes.gptq-w4g128.bits=5", "+model.colour=red")
    assert "recipes.gptq-w4g128.bits" in str(error.value) and "model.colour" in str(error.value)


def test_parameters_do_not_change_after_loading(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(as_yaml(composed()))
    params = load_params(path)
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3


@pytest.mark.parametrize("content", [None, "", "- a\n", "a: [\n", b"\xff\xfe"])
def test_an_unreadable_file_is_told_with_what_mends_it(tmp_path, content):
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="quantline compose"):
        load_params(path)


def test_missing_inputs_are_named():
    params = validate(composed("model=local", "model.path=no/model", "evaluation.gold=no/gold.jsonl"))
    told = missing_inputs(params)
    assert "model.path: there is no no/model" in told and "evaluation.gold: there is no no/gold.jsonl" in told
    assert not [one for one in missing_inputs(validate(composed("model=smollm2-135m"))) if one.startswith("model")]
