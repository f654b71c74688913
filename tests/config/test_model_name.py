"""The model's name, as the model registry has it."""

import pytest

from quantline.config.compose import compose
from quantline.config.model_name import model_name
from tests.helpers.project import ROOT


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"source": "demo", "path": "demo/model"}, "demo"),
        ({"source": "hub", "id": "HuggingFaceTB/SmolLM2-135M"}, "SmolLM2-135M"),
        ({"source": "local", "path": "/models/mine/"}, "mine"),
        ({"source": "local", "path": "/models/Mine v2: Q8.gguf"}, "Mine-v2-Q8"),
        ({"source": "local", "path": "llama-3.2-1b"}, "llama-3.2-1b"),
        ({"source": "hub", "id": "a/base", "adapter": "out/tuned"}, "base-tuned"),
        ({"source": "local", "path": "/"}, "model"),
        ({}, "model"),
    ],
)
def test_model_name_is_what_the_id_or_path_ends_with(model, name):
    assert model_name(model) == name


def test_compose_names_the_registered_model_after_model_and_target():
    registry = compose(["model=smollm2-135m", "target=edge"], ROOT)["tracking"]["registry"]
    assert registry["name"] == "quantline-SmolLM2-135M-Instruct-edge"
    assert registry["promote"] == "explicit"
