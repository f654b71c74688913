"""Every family's checkpoint is what its table says."""

import numpy as np
import pytest

from quantline.ingest import verify
from quantline.model.find_family import family_of, is_tied


def test_check_checkpoint_finds_what_config_json_asks_for(family):
    checkpoint = family.checkpoint
    arch = family.arch
    summary = verify.check_checkpoint(checkpoint)
    sizes = [np.prod(checkpoint.shape(name)) for name in checkpoint.names]
    assert summary["parameters"] == sum(sizes) > 0
    assert summary["sizes"] == {
        "hidden": 64,
        "layers": 2,
        "heads": 4,
        "vocabulary": arch.vocab_size,
    }
    assert all(arch.part(name) for name in checkpoint.names)
    assert {f"{name}.weight" for name in arch.linears()} <= set(checkpoint.names)
    for layer in range(arch.layers):
        grouped = [name for group in arch.input_groups(layer) for name in group.linears]
        assert grouped
        assert sorted(grouped) == sorted(arch.linears_of(layer))


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gemma2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "gemma3_text", "tie_word_embeddings": False}, False),
        ({}, False),
    ],
)
def test_is_tied_is_as_transformers_takes_it(config, tied):
    assert is_tied(config, family_of(config)) is tied
