"""What is refused because transformers would not load it."""

from dataclasses import replace

import pytest

from quantline.errors import Failure, StageError
from quantline.formats.safetensors.loadable import check_loadable
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.tensors import Scheme

SCHEMES = {Scheme("int4", False, 32, False): ["model.layers.0.mlp.up_proj"]}


def test_a_layer_that_blocks_share_is_refused_by_name(make_model, tmp_path):
    """transformers ties the weight of a layer that has only packed ones."""
    arch = Checkpoint(make_model(tmp_path / "model", "olmo2", num_hidden_layers=1)).arch
    check_loadable(arch, "compressed-tensors", SCHEMES, activations=False)
    name = "model.layers.0.mlp.up_proj.weight"
    place = arch.structure.tensors[name]
    tensors = arch.structure.tensors | {name: replace(place, paths=(name, f"twice.{name}"))}
    shared = replace(arch, structure=replace(arch.structure, tensors=tensors))
    with pytest.raises(StageError, match="layers that several blocks share") as caught:
        check_loadable(shared, "compressed-tensors", SCHEMES, activations=False)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
