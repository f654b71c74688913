"""What a composition changes, in few lines."""

import re

from quantline.config import changes
from quantline.config.changes import summary
from quantline.config.compose import compose
from quantline.config.params import Params
from quantline.config.validation import validate
from tests.helpers.project import ROOT


def composed(*overrides: str) -> Params:
    return validate(compose(overrides, root=ROOT))


def test_another_suite_is_told_by_the_names_that_come_and_go():
    lines = summary(composed("suite=default"), composed("suite=quick"))
    assert lines == [
        "suite: default -> quick",
        "recipes: without q4_k_m-curvature, q8_0, awq-w4g128, rtn-w8",
        "variants: without gguf-q4_k_m-curvature, gguf-q8_0, awq-w4g128, onnx-fp32, onnx-int8, "
        "onnx-int4-gptq",
    ]
    back = summary(composed("suite=quick"), composed("suite=default"))
    assert back[1].startswith("recipes: with q4_k_m-curvature")
    assert summary(composed("suite=full"), composed("suite=full")) == []


def test_options_of_what_stays_are_told_one_by_one():
    lines = summary(composed(), composed("recipes.gptq-w4g128.bits=3", "suite=quick"))
    assert "recipes.gptq-w4g128.bits: 4 -> 3" in lines
    lines = summary(composed(), composed("target=edge"))
    assert "target.gates.0.threshold: 0.1 -> 0.2" in lines
    assert "target.hardware.name: 'absent' -> 'Raspberry Pi 5'" in lines
    assert not any(line.startswith("target.hardware: ") for line in lines)


def test_paths_are_told_once_and_what_dvc_watches_not_at_all():
    lines = summary(composed(), composed("model.path=/models/mine"))
    assert lines == ["model.path: 'demo/model' -> '/models/mine'"]


def test_of_very_many_options_the_number_is_told(monkeypatch):
    monkeypatch.setattr(changes, "MOST", 2)
    lines = summary(composed(), composed("target=edge"))
    assert len(lines) == 3
    assert re.fullmatch(r"and \d+ more options", lines[-1])
