"""Which layers load finds in a model without a table, by what each of them does when it runs."""

from quantline.ingest.verify.blocks import check_blocks
from quantline.model.checkpoint import Checkpoint

BLOCK = "backbone.layers.0.mixer"


def test_check_blocks_keeps_layers_that_are_linear_by_class_alone(make_model, tmp_path):
    """Mamba multiplies by the weight of dt_proj, and never calls it."""
    sizes = {"hidden_size": 64, "state_size": 8, "time_step_rank": 32, "num_hidden_layers": 1}
    checkpoint = Checkpoint(make_model(tmp_path / "model", "mamba", **sizes))
    assert checkpoint.structure is not None
    assert f"{BLOCK}.dt_proj" in checkpoint.structure.linears[0]
    found = check_blocks(checkpoint)
    names = [f"{BLOCK}.{name}" for name in ("in_proj", "x_proj", "out_proj")]
    assert sorted(found.linears[0]) == sorted(names)
    assert f"{BLOCK}.dt_proj" in found.kept_linears
    grouped = [name for group in found.inputs[0] for name in group.linears]
    assert sorted(grouped) == sorted(names)
    before = {group.linears[0]: group.before for group in found.inputs[0]}
    assert before[f"{BLOCK}.in_proj"] == "backbone.layers.0.norm"
