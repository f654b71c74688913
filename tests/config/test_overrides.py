"""Overrides with any letter, and those that mean something to Hydra."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.config.compose import compose
from quantline.config.overrides import for_hydra
from quantline.errors import ConfigError
from tests.helpers.project import ROOT

CONF = ROOT / "conf"
NAMES = [
    *("my models", "größe", "模型", "a,b", "epoch=3-step=9", "x (copy)", "50%", "v1|v2", "a#b"),
    *("it's", "user@host", "{x}", "$HOME", "a:b", "~backup", "1e5", "true", "12", "[a,b]", "a;b"),
    *('say "x"', " blank", "blank ", "tab\there", "new\nline", "back\\slash", "end\\", "&", "<x>"),
    *("choice(1,2)", "range(1,3)", "a, b", "🙂", "é", "e\u0301", "!", "`x`", "^", "*", "?", "+x"),
    *("{a:1}", "null.d", "-", "--x", "a=", "=a", '"half', "'half", "#", "a: b", "nan"),
]


def read_back(override: str) -> tuple[str, object]:
    """Return the key and value that Hydra and OmegaConf make of an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(override)
    value = OmegaConf.create({"value": parsed.value(), "x": "interpolated"})
    return parsed.key_or_group, OmegaConf.to_container(value, resolve=True)["value"]


@pytest.mark.parametrize("folder", ["", "/data/", "../"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_what_was_typed(name, folder):
    (form,) = for_hydra([f"model.path={folder}{name}"], CONF)
    # DVC would take a: for an address like s3:
    expected = f"./{name}" if not folder and name in ("a:b", "a: b") else folder + name
    assert read_back(form) == ("model.path", expected)


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_text_is_what_was_typed(text):
    (form,) = for_hydra([f"model.path=/x{text}y"], CONF)
    if "${" in text:  # an interpolation, or none that OmegaConf can read
        assert form == f"++model.path=/x{text}y"
    else:
        assert read_back(form) == ("model.path", f"/x{text}y")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('model.path="a, b"', "a, b"),
        ("model.path='größe'", "größe"),
        (r"model.path=a\,b", "a,b"),
        ("model.path=${x}/m", "interpolated/m"),
        (r"model.path=\${x}", "${x}"),
        ("evaluation.gold=null", None),
        ("calibration.part=[0.0,0.5]", [0.0, 0.5]),
        ("evaluation.limits={seconds: 3}", {"seconds": 3}),
        ('evaluation.smoke_prompts=["größe", b]', ["größe", "b"]),
        ("model.revision=1234567", "1234567"),
        ("model.revision=1e5", "1e5"),
        ("seed=3", 3),
        ("+recipes.int8.substitution=fail", "fail"),
        ("recipe=[none,int8]", ["none", "int8"]),
    ],
)
def test_what_hydra_knows_keeps_its_meaning(override, value):
    (form,) = for_hydra([override], CONF)
    assert read_back(form)[1] == value


def test_what_is_there_is_meant_before_what_hydra_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("${x}", '"x"', "a\\,b"):
        Path(name).mkdir()
        (form,) = for_hydra([f"model.path={name}"], CONF)
        assert read_back(form)[1] == name


def test_the_home_folder_is_that_of_the_user_and_no_other_name_that_begins_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    (form,) = for_hydra(["model.path=~/models/größe"], CONF)
    assert read_back(form)[1] == "/home/ada/models/größe"
    (form,) = for_hydra(["model.id=~/x"], CONF)
    assert read_back(form)[1] == "~/x"


def test_a_path_with_every_kind_of_letter_composes():
    path = "/in/größe, 模型 #1 (it's {x} = 50%)"
    composed = compose(["model=local", f"model.path={path}", f"evaluation.gold={path}"], root=ROOT)
    assert composed["model"]["path"] == composed["model"]["watch"] == path
    assert composed["evaluation"]["gold_watch"] == path


def test_an_interpreter_of_any_runtime_can_be_named():
    composed = compose(["evaluation.pythons.transformers=/opt/a b/python"], root=ROOT)
    assert composed["evaluation"]["pythons"]["transformers"] == "/opt/a b/python"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe=gtpq", "recipe=gtpq: there is no recipe gtpq (did you mean gptq-w2g32-refined"),
        ("recipe=[none,q4_k_n]", "did you mean q4_k_s?"),
        ("+variant=gguf-f17", "did you mean gguf-f16?"),
        ("model=größe", "model=größe: there is no model größe; there are demo, hub"),
        ("suit=quick", "suit: unknown key (did you mean suite?)"),
        ("foo", "expected an override of the form key=value, found 'foo'"),
        ("", "found ''"),
        ("=", "found '='"),
        ("größe=3", "found 'größe=3'"),
        ("evaluation.smoke_prompts=[größe]", "into double quotes"),
        ("target.max_size_mib=1 (or 2)", "into double quotes"),
        ("seed=1,2", "dvc exp run --queue -S"),
        ("conf_sha256=1", "conf_sha256 is computed from conf/"),
        ("+conf_sha256=1", "conf_sha256 is computed from conf/"),
        ("hydra.searchpath=[x]", "changes Hydra"),
        ("model.path=", "model.path= has no value; give a path, or null"),
        ("evaluation.gold= ", "evaluation.gold= has no value"),
        ("model.path=\udcff", "in UTF-8"),
        ("recipes.q4_k_m.bits=3", "recipes.q4_k_m.bits: there is no such key"),
        ("model.path=${nope}", "${nope} names no key of params.yaml"),
    ],
)
def test_what_is_no_override_is_said_in_our_words(override, words):
    with pytest.raises(ConfigError) as caught:
        compose([override], root=ROOT)
    message = str(caught.value)
    assert words in message
    assert not {"hydra.cc", "Exception", "mismatched", "search path"} & set(message.split())
    assert "See https" not in message
