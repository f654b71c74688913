"""What does not fit the schema is named by its key, with the keys or names that are valid."""

import pytest

from quantline.config.compose import compose
from quantline.errors import ConfigError
from tests.helpers.project import ROOT

RECIPE = r"recipes\.gptq-w4g128"
# Override → what the message has to match.
PROBLEMS = [
    ("variant=[]", r"variants: expected at least one, found none; name some with variant=\[...\]"),
    ("model.id=a/b", "source demo takes no id, found 'a/b'"),
    ("model.revision=main", "source demo takes no revision"),
    ("calibration.dataset=a/b", "source file takes no dataset"),
    (
        "+recipes.gptq-w4g128.bitts=3",
        RECIPE + r"\.bitts: unknown key \(did you mean bits\?\); valid keys here are act_order, "
        "bits, budget, curvature, damping, embedding_bits, group_size, method, ",
    ),
    ("recipes.gptq-w4g128.bitts=3", RECIPE + r"\.bitts: unknown key \(did you mean bits\?\)"),
    (
        "model.pth=x",
        r"model\.pth: unknown key \(did you mean path\?\); valid keys here are .*revision",
    ),
    (
        "+modle={}",
        r"modle: unknown key \(did you mean model\?\); valid keys here are calibration, ",
    ),
    (
        "+evaluation.speed.thread=1",
        r"evaluation\.speed\.thread: unknown key \(did you mean threads\?\)",
    ),
    (
        "target.gates=[{metric: a, operator: '<=', threshold: 1, must: true}]",
        r"target\.gates\.0\.must: unknown key",
    ),
    ("recipes.gptq-w4g128.bits=5", "^" + RECIPE + r"\.bits: .*2, 3, 4 or 8, found 5"),
    ("recipes.gptq-w4g128.group_size=48", "^" + RECIPE + r"\.group_size: .*found 48"),
    ("recipes.gptq-w4g128.damping=nan", "^" + RECIPE + r"\.damping: .*finite"),
    (
        "recipes.gptq-w4g128.method=gtpq",
        RECIPE + r"\.method: unknown method 'gtpq' \(did you mean gptq\?\)",
    ),
    ("recipes.q4_k_m.mix=Q4_X", r"recipes\.q4_k_m\.mix: .*Q4_K_M.*found 'Q4_X'"),
    ("+recipes.Upper={method: none}", r"recipes\.Upper: a name has only"),
    (
        "variants.bf16.recipe=nought",
        r"variants\.bf16\.recipe: no recipe 'nought' in this suite; there are awq-w4g128",
    ),
    (
        "variants.bf16.runtime=onnxruntime",
        r"variants\.bf16\.runtime: safetensors is served by transformers or vllm, "
        "found onnxruntime",
    ),
    (
        "+variants.gptq-w4g128.dtype=float16",
        r"variants\.gptq-w4g128\.dtype: only a variant whose recipe",
    ),
    (
        "+variants.onnx-fp32.dtype=bfloat16",
        r"variants\.onnx-fp32\.dtype: onnx is exported in float32 or float16",
    ),
    (
        "+variants.bf16.split_max_mib=100",
        r"variants\.bf16\.split_max_mib: safetensors is never split, found 100",
    ),
    (
        "+variants.gguf-q4_k_m.split_max_mib=0",
        r"variants\.gguf-q4_k_m\.split_max_mib: .*greater than 0",
    ),
    (
        "+recipes.q4_k_m.overrides={attn_v: Q9}",
        r"recipes\.q4_k_m\.overrides\.attn_v: .*Q8_0.*found 'Q9'",
    ),
    ("evaluation.limits.seconds=0", r"evaluation\.limits\.seconds: .*greater than 0, found 0"),
    (
        "evaluation.limits.memory_mib=-1",
        r"evaluation\.limits\.memory_mib: .*greater than 0, found -1",
    ),
    (
        "+evaluation.limits.memory=1",
        r"evaluation\.limits\.memory: unknown key \(did you mean memory_mib\?\); "
        "valid keys here are memory_mib, seconds",
    ),
    (
        "+evaluation.pythons.torch=python",
        r"evaluation\.pythons\.torch: unknown runtime 'torch'.*transformers",
    ),
    (
        "+recipes.q4_k_m.budget={size_mib: 3, bits_per_weight: 4}",
        r"recipes\.q4_k_m\.budget: expected one limit, found size_mib and",
    ),
    (
        "+recipes.q4_k_m.budget={size: 3}",
        r"recipes\.q4_k_m\.budget\.size: unknown key .*valid keys here are bits_per_weight, "
        "size_mib, types",
    ),
    (
        "+recipes.gptq-w4g128.budget={types: [Q4_K]}",
        r"budget\.types: unknown key.*valid keys here are bits, bits_per_weight, format, "
        "group_sizes, size_mib",
    ),
    (
        "+recipes.q4_k_m.budget={types: [Q9]}",
        r"recipes\.q4_k_m\.budget\.types\.0: .*Q8_0.*found 'Q9'",
    ),
    (
        "+recipes.q4_k_m-curvature.budget={types: [IQ2_XXS]}",
        r"recipes\.q4_k_m-curvature\.budget\.types\.0: .*found 'IQ2_XXS'",
    ),
    ("+recipes.q4_k_m.budget={types: []}", r"recipes\.q4_k_m\.budget\.types: .*at least 1"),
    (
        "+recipes.q4_k_m.budget={size_mib: 0}",
        r"recipes\.q4_k_m\.budget\.size_mib: .*greater than 0",
    ),
    (
        "+recipes.gptq-w4g128.budget={bits_per_weight: inf}",
        RECIPE + r"\.budget\.bits_per_weight: .*finite",
    ),
    ("+recipes.none.budget={}", r"recipes\.none\.budget: unknown key"),
    ("calibration.part=[0.6,0.5]", r"calibration: .*0 <= from < to <= 1"),
    ("suite=quik", r"there is no suite quik \(did you mean quick\?\)"),
    ("model=local", r"model\.path has no value; give one: model\.path=\.\.\."),
    ("model=hub", r"model\.id has no value"),
]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "^seed: Input should be greater than or equal to 0, found -1"),
        ("seed=4294967296", "^seed: Input should be less than 4294967296"),
        ("evaluation.speed.seconds=inf", r"speed\.seconds: .*finite"),
        ("evaluation.limits.seconds=inf", r"limits\.seconds: .*finite"),
        ("limits.seconds=1e400", r"limits\.seconds: .*finite"),
        ("target.max_size_mib=inf", r"target\.max_size_mib: .*finite"),
        ("evaluation.speed.new_tokens=99999999999999999999", r"\.new_tokens: .* at most 2\^53"),
    ],
)
def test_validate_refuses_numbers_that_a_library_would_stumble_over(override, message):
    with pytest.raises(ConfigError, match=message):
        compose(["suite=quick", override], ROOT)


# What the default suite alone has; all else is composed from the quick one, in half the time.
OF_DEFAULT = ("awq-w4g128", "onnx-fp32", "q4_k_m-curvature", "suite=")


@pytest.mark.parametrize(("override", "message"), PROBLEMS)
def test_validate_names_what_does_not_fit(override, message):
    of_default = any(name in override + message for name in OF_DEFAULT)
    with pytest.raises(ConfigError, match=message):
        compose([override] if of_default else ["suite=quick", override], ROOT)


@pytest.mark.parametrize(
    ("variant", "container", "recipe", "message"),
    [
        (
            "gguf-q4_k_m",
            "gguf",
            "rtn-w8",
            "gguf carries the methods kquant, kquant-curvature, none",
        ),
        ("bf16", "safetensors", "q4_k_m", "safetensors carries the methods awq, fp8, gptq"),
    ],
)
def test_validate_refuses_a_recipe_that_the_format_cannot_carry(
    variant, container, recipe, message
):
    overrides = [f"variants.{variant}.recipe={recipe}", f"variants.{variant}.format={container}"]
    with pytest.raises(ConfigError, match=rf"variants\.{variant}\.recipe: {message}"):
        compose(overrides, ROOT)


def test_validate_lists_the_methods_that_are_registered():
    with pytest.raises(ConfigError) as error:
        compose(["suite=quick", "recipes.gptq-w4g128.method=gtpq"], ROOT)
    assert str(error.value) == (
        "recipes.gptq-w4g128.method: unknown method 'gtpq' (did you mean gptq?); there are awq, "
        "fp8, gptq, int8, kquant, kquant-curvature, none, rtn, smoothquant"
    )


def test_validate_lists_the_formats_that_are_registered():
    with pytest.raises(ConfigError) as error:
        compose(["suite=quick", "variants.bf16.format=ggf"], ROOT)
    assert str(error.value) == (
        "variants.bf16.format: unknown format 'ggf' (did you mean gguf?); there are gguf, onnx, "
        "safetensors"
    )


def test_validate_lists_the_runtimes_that_are_registered():
    with pytest.raises(ConfigError) as error:
        compose(["suite=quick", "variants.bf16.runtime=lama.cpp", "target.runtimes=[onnx]"], ROOT)
    names = "there are llama.cpp, onnxruntime, onnxruntime-genai, transformers, vllm"
    assert str(error.value).splitlines() == [
        f"variants.bf16.runtime: unknown runtime 'lama.cpp' (did you mean llama.cpp?); {names}",
        f"target.runtimes.0: unknown runtime 'onnx'; {names}",
    ]


@pytest.mark.parametrize("section", ["recipes", "variants"])
def test_validate_refuses_a_section_or_an_entry_that_is_no_mapping(section):
    with pytest.raises(ConfigError, match=f"^{section}: Input should be a valid dictionary"):
        compose(["suite=quick", f"{section}=3"], ROOT)
    name = {"recipes": "none", "variants": "bf16"}[section]
    with pytest.raises(ConfigError, match=rf"^{section}\.{name}"):
        compose(["suite=quick", f"{section}.{name}=3"], ROOT)


def test_validate_names_all_that_is_wrong_at_once():
    with pytest.raises(ConfigError) as error:
        compose(["suite=quick", "recipes.gptq-w4g128.bits=5", "+model.colour=red"], ROOT)
    assert "recipes.gptq-w4g128.bits" in str(error.value)
    assert "model.colour" in str(error.value)
