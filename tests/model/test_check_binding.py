"""What a checkpoint has beside a model's own tensors."""

import pytest

from quantline.model.check_binding import tensors_of_towers

TEXT = ["model.language_model.layers.0.q.weight", "lm_head.weight"]
TOWERS = ["model.visual.blocks.0.q.weight", "projector.weight", "audio.conv.weight"]
FOUND = {
    "model.visual.blocks.0.q.bias": True,
    "audio.conv.bias": True,
    "projector.bias": True,
    "model.language_model.layers.0.q.bias": False,
    "model.strange.weight": False,
    "lm_head.bias": False,
    "strange": False,
}


@pytest.mark.parametrize("key", FOUND)
def test_only_what_lies_in_a_tower_is_of_a_tower(key):
    assert tensors_of_towers([key], TEXT, TOWERS) == ([key] if FOUND[key] else [])


def test_a_model_without_towers_has_nothing_of_one():
    assert tensors_of_towers(["strange.weight"], TEXT, []) == []
