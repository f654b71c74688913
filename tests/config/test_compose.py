"""conf/ composes to parameters that fit the schema, with every value written out."""

from functools import cache, partial
from pathlib import Path

import pytest
import ruamel.yaml
import yaml
from omegaconf import OmegaConf

from quantline.config.compose import as_yaml, compose, load_params, missing_inputs, to_yaml
from quantline.config.validation import validate
from quantline.errors import ConfigError
from tests.helpers.project import ROOT

CONF = ROOT / "conf"
# What a choice needs besides itself.
NEEDED = {
    "model=local": ["model.path=some/folder"],
    "model=hub": ["model.id=owner/name"],
    "calibration=file": ["calibration.path=t.txt"],
    "evaluation=file": ["evaluation.path=t.txt"],
    "tracking=server": ["tracking.uri=https://example.org"],
}


def names(group: str) -> list[str]:
    """Return the choices of a group; files whose name begins with _ are the bases of others."""
    stems = sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem[0] != "_")
    assert stems
    return stems


@cache
def composed(*overrides: str) -> dict:
    """Compose the repository's conf/; the values are shared, so no test may change them."""
    return compose(list(overrides), ROOT)


def choose(group: str, name: str) -> dict:
    """Compose a choice, with the smallest suite if it is that of another group."""
    choice = f"{group}={name}"
    suite = [] if group == "suite" else ["suite=quick"]
    return composed(*suite, choice, *NEEDED.get(choice, []))


@pytest.mark.parametrize("suite", names("suite"))
def test_compose_takes_every_suite(suite):
    params = validate(composed(f"suite={suite}"))
    assert params.suite == suite
    assert params.variants
    assert {variant.recipe for variant in params.variants.values()} <= params.recipes.keys()


@pytest.mark.parametrize("model", names("model"))
def test_compose_takes_every_model(model):
    assert validate(choose("model", model)).model.watch


@pytest.mark.parametrize("target", names("target"))
def test_compose_takes_every_target(target):
    assert validate(composed(f"target={target}")).target.name == target


@pytest.mark.parametrize("text", names("calibration"))
def test_compose_takes_every_calibration(text):
    assert validate(choose("calibration", text)).calibration.watch


@pytest.mark.parametrize("text", names("evaluation"))
def test_compose_takes_every_evaluation(text):
    assert validate(choose("evaluation", text)).evaluation.watch


CHOICES = [
    (group, name)
    for group in ("suite", "target", "model", "calibration", "evaluation", "tracking", "executor")
    for name in names(group)
]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_validate_fills_in_nothing_that_conf_leaves_out(group, name):
    """A default of the schema would change results while DVC sees the same params.yaml."""
    values = choose(group, name)
    assert validate(values).model_dump(mode="json") == values


@pytest.mark.parametrize("group", ["recipe", "variant"])
def test_compose_reaches_every_recipe_and_variant_through_the_suites(group):
    """A small YAML file that no suite names would never be tried."""
    section = {"recipe": "recipes", "variant": "variants"}[group]
    reached = set()
    for suite in ("full", "layouts", "genai", "vllm"):
        reached |= composed(f"suite={suite}")[section].keys()
    assert sorted(reached) == names(group)


def test_compose_default_suite():
    params = validate(composed())
    assert list(params.variants) == [
        "bf16",
        "gguf-q4_k_m",
        "gguf-q4_k_m-curvature",
        "gguf-q8_0",
        "awq-w4g128",
        "gptq-w4g128",
        "rtn-w4g128",
        "onnx-fp32",
        "onnx-int8",
        "onnx-int4-gptq",
    ]
    assert params.variants["onnx-int4-gptq"].recipe == params.variants["gptq-w4g128"].recipe


def test_compose_makes_the_committed_parameters():
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == composed()


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(composed, id="default"),
        pytest.param(partial(composed, "model.adapter=a"), id="adapter"),
        *(
            pytest.param(partial(choose, *choice), id="=".join(choice))
            for choice in (
                ("suite", "full"),
                ("model", "local"),
                ("model", "qwen3-0.6b"),
                ("calibration", "hub"),
                ("evaluation", "hub"),
                ("calibration", "file"),
                ("evaluation", "file"),
            )
        ),
    ],
)
def test_compose_has_all_that_dvc_yaml_refers_to(values):
    """Parameters of stages and `${...}` in their dependencies exist and are not null."""
    values = values()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    keys = []
    paths = []
    for stage in stages.values():
        keys += stage.get("params", [])
        paths += [path[2:-1] for path in stage.get("deps", []) if path.startswith("${")]
    assert keys
    assert "model.watch" in paths
    for key in [*keys, *paths]:
        value = values
        for part in key.split("."):
            assert part in value, key
            value = value[part]
        assert key in keys or isinstance(value, str), key


def test_compose_shares_one_text_between_calibration_and_evaluation():
    params = validate(
        composed(
            "suite=quick",
            "calibration=file",
            "calibration.path=t.txt",
            "evaluation=file",
            "evaluation.path=t.txt",
        )
    )
    assert params.calibration.part[1] <= params.evaluation.part[0]
    assert params.evaluation.gold is None
    assert params.evaluation.gold_watch == "t.txt"


def test_compose_watches_gold_set_and_adapter_where_there_are_any():
    params = validate(composed("suite=quick", "evaluation.gold=g.jsonl", "model.adapter=lora"))
    assert params.evaluation.gold_watch == "g.jsonl"
    assert params.model.adapter_watch == "lora"


@pytest.mark.parametrize(
    ("overrides", "variants"),
    [
        (["suite=quick", "variant=[bf16]"], ["bf16"]),
        (["suite=quick", "~variants.bf16"], ["gguf-q4_k_m", "rtn-w4g128", "gptq-w4g128"]),
        (
            ["suite=quick", "+variant=[gguf-f16]"],
            ["bf16", "gguf-q4_k_m", "rtn-w4g128", "gptq-w4g128", "gguf-f16"],
        ),
    ],
)
def test_compose_chooses_variants_by_overrides(overrides, variants):
    assert list(composed(*overrides)["variants"]) == variants


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("+recipes.gptq-w4g128.damping=0.05", ("gptq-w4g128", "damping"), 0.05),
        ("++recipes.gptq-w4g128.damping=0.05", ("gptq-w4g128", "damping"), 0.05),
        ("recipes.gptq-w4g128.damping=0.05", ("gptq-w4g128", "damping"), 0.05),
        ("+recipes.q4_k_m.overrides={attn_v: Q8_0}", ("q4_k_m", "overrides"), {"attn_v": "Q8_0"}),
        ("+recipes.q4_k_m.overrides.attn_v=Q8_0", ("q4_k_m", "overrides"), {"attn_v": "Q8_0"}),
    ],
)
def test_compose_takes_a_plus_before_a_key_that_conf_has(override, keys, value):
    """Scripts say `+recipes.x.y=...` for options that conf/ once left to the schema."""
    recipe, option = keys
    assert composed("suite=quick", override)["recipes"][recipe][option] == value


def test_compose_derives_format_and_runtime_of_a_variant_from_its_recipe():
    variants = composed("suite=quick", "+variant=[gguf-f16,onnx-fp32-genai]")["variants"]
    assert (variants["gptq-w4g128"]["format"], variants["gptq-w4g128"]["runtime"]) == (
        "safetensors",
        "transformers",
    )
    assert (variants["gguf-q4_k_m"]["format"], variants["gguf-q4_k_m"]["runtime"]) == (
        "gguf",
        "llama.cpp",
    )
    # A format that the variant names comes before the recipe's, and so does a runtime.
    assert variants["gguf-f16"]["runtime"] == "llama.cpp"
    assert variants["onnx-fp32-genai"]["runtime"] == "onnxruntime-genai"


def test_params_do_not_change_after_loading(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(as_yaml(composed()))
    params = load_params(path)
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3


@pytest.mark.parametrize("content", [None, "", "- a\n", "a: [\n", b"\xff\xfe"])
def test_load_params_says_how_to_mend_an_unreadable_file(tmp_path, content):
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="quantline compose"):
        load_params(path)


@pytest.mark.parametrize(
    "text",
    ["12e4567", "1e5", "nan", "0o14", "12:30", "1_000", "yes", "null", "~", ".5", "a: b", "ö"],
)
def test_a_text_of_params_yaml_is_one_to_every_reader(text):
    written = to_yaml({"revision": text})
    assert yaml.safe_load(written) == {"revision": text}
    assert ruamel.yaml.YAML(typ="safe").load(written) == {"revision": text}  # as DVC reads it
    assert OmegaConf.create(written)["revision"] == text


def test_missing_inputs_names_the_key_of_each_absent_path():
    overrides = ["suite=quick", "model=local", "model.path=no/model"]
    overrides += ["evaluation.gold=no/gold.jsonl"]
    problems = missing_inputs(validate(composed(*overrides)))
    assert f"model.path: there is no no/model in {Path.cwd()}; correct the path" in problems
    assert (
        f"evaluation.gold: there is no no/gold.jsonl in {Path.cwd()}; correct the path" in problems
    )
    of_a_hub_model = missing_inputs(validate(choose("model", "smollm2-135m")))
    assert not [problem for problem in of_a_hub_model if problem.startswith("model")]
