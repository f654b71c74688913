"""Refinement as a part of quantizing: what is kept, what resumes, and what is refused before."""

import shutil

import numpy as np
import pytest
import torch

from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.store import CalibrationStore
from quantline.config.executor import Executor
from quantline.config.recipes import parse_recipe
from quantline.config.variants import Variant
from quantline.errors import Failure, StageError
from quantline.files import sha256_files
from quantline.formats.safetensors.container import SafetensorsContainer
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel, QuantizedWriter
from quantline.recipes.quantize import quantize_model, summarize
from quantline.recipes.refinement import check, refine
from quantline.recipes.refinement.rounded_run import RoundedRun
from quantline.recipes.refinement.state import RefinementState
from tests.helpers.calibrated import calibrate_into
from tests.helpers.models import transformers_model, write_model
from tests.helpers.quantized import differing, tokens_of, torch_logprobs, torch_model

GRID = {"bits": 2, "group_size": 32, "symmetric": False}
STEPS = {"steps": 3, "learning_rate": 0.01}
RECIPES = {
    "gptq": {"method": "gptq", **GRID},
    "awq": {"method": "awq", "rounding": "gptq", **GRID},
    "rtn": {"method": "rtn", **GRID, "symmetric": True, "embedding_bits": None},
}


def recipe_of(name: str = "rtn", **refine):
    return parse_recipe(RECIPES[name] | {"refine": STEPS | refine})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(checkpoint, its calibration) whose text is three sequences, over and over."""
    folder = tmp_path_factory.mktemp("refine")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "seed": 3}
    checkpoint = Checkpoint(write_model(folder / "model", **sizes))
    tokens = np.tile(tokens_of(checkpoint, 3, 24), (4, 1))
    return checkpoint, calibrate_into(folder / "calibration", checkpoint, tokens)


def quantized(model, folder, recipe, executor=None):
    """Quantize into a folder; return the report."""
    folder.mkdir(exist_ok=True)
    checkpoint, calibration = model
    store = CalibrationStore(calibration.folder)
    return quantize_model("r", recipe, checkpoint, store, folder, executor)


def digest(folder) -> str:
    return sha256_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))


def divergence(checkpoint, folder) -> float:
    """Return the mean KL divergence of a store on the calibration's text, by transformers."""
    tokens = tokens_of(checkpoint, 3, 24)
    wanted = torch_logprobs(transformers_model(checkpoint.folder), tokens)
    found = torch_logprobs(torch_model(checkpoint, QuantizedModel(folder)), tokens)
    return float((np.exp(wanted) * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("name", RECIPES)
def test_quantize_model_refines_downhill(model, tmp_path, name):
    checkpoint, _ = model
    steps = {"steps": 12, "learning_rate": 0.01}
    plain = quantized(model, tmp_path / "plain", recipe_of(name, steps=0))
    report = quantized(model, tmp_path / "refined", recipe_of(name, **steps))
    found = report["refine"]
    assert found["kept"] and found["kld_after"] < 0.9 * found["kld_before"]
    assert found["held_out_tokens"] == 24 and found["steps"] == 12
    assert report["transforms"] == [
        *plain["transforms"][:-1],
        plain["transforms"][-1] | {"refine": {**steps, "sequences": 4}},
        {"step": "refine", **found},
    ]
    # As transformers has it, of a model with the stored weights.
    before, after = (divergence(checkpoint, tmp_path / kind) for kind in ("plain", "refined"))
    assert after < 0.95 * before
    assert "refine" not in plain and not (tmp_path / "refined" / "refinement").exists()
    summary = summarize(report, recipe_of(name, **steps))
    assert "12 steps of refinement, divergence" in summary.text
    assert summary.metrics["refine_kld_after"] == found["kld_after"]


@pytest.mark.parametrize("name", RECIPES)
def test_quantize_model_refines_scales_and_norms_and_no_integers(model, tmp_path, name):
    checkpoint, _ = model
    quantized(model, tmp_path / "plain", recipe_of(name, steps=0))
    quantized(model, tmp_path / "refined", recipe_of(name))
    plain, refined = QuantizedModel(tmp_path / "plain"), QuantizedModel(tmp_path / "refined")
    assert refined.linears == plain.linears and refined.outside == plain.outside
    for layer in plain.linears:
        before, after = plain.linear(layer), refined.linear(layer)
        assert np.array_equal(before.integers, after.integers)
        assert np.array_equal(before.zeros, after.zeros)
        assert before.describe() == after.describe()
        moved = after.scales / before.scales
        assert (moved != 1).any() and (np.abs(moved - 1) < 0.1).all()
        halves = torch.from_numpy(after.scales).bfloat16().float()
        assert np.array_equal(halves.numpy(), after.scales)
    norms = {name for name in checkpoint.names if name.endswith("norm.weight")}
    assert set(refined.overrides) == set(plain.overrides) | norms
    for norm in norms:
        halves = torch.from_numpy(refined.override(norm)).bfloat16().float()
        assert np.array_equal(halves.numpy(), refined.override(norm))


def test_quantize_model_keeps_what_no_step_has_bettered(model, tmp_path, monkeypatch):
    """A step uphill is measured, told and left out."""
    plain = quantized(model, tmp_path / "plain", recipe_of(steps=0))
    move = refine.move
    monkeypatch.setattr(refine, "move", lambda moved, way, *more: move(moved, -way, *more))
    report = quantized(model, tmp_path / "uphill", recipe_of())
    found = report["refine"]
    assert not found["kept"] and found["kld_after"] > found["kld_before"]
    assert "3 steps of refinement not kept: divergence" in summarize(report, recipe_of()).text
    assert report["layers"] == plain["layers"]
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "uphill" / path.name).read_bytes()
    assert not (tmp_path / "uphill" / "norms.safetensors").exists()


def test_quantize_model_keeps_nothing_that_overflows(model, tmp_path, monkeypatch):
    divergence = RoundedRun.divergence

    def overflown(run, numbers, advance):
        found = divergence(run, numbers, advance)
        return float("nan") if run.student.stored else found

    monkeypatch.setattr(RoundedRun, "divergence", overflown)
    report = quantized(model, tmp_path / "r", recipe_of())
    assert report["refine"]["kld_after"] is None and not report["refine"]["kept"]
    assert "NaN with them" in summarize(report, recipe_of()).text


class Killed(BaseException):
    """Ends a run as a kill does: nothing is tidied up."""


def kill_at(monkeypatch, number: int) -> list[int]:
    """Kill whoever writes anything after so many writes; return how many are left, as a list."""
    left = [number]

    def counted(own):
        def write(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return own(*arguments, **named)

        return write

    for owner, name in (
        (RefinementState, "note"),
        (RefinementState, "write"),
        (RefinementState, "keep_result"),
        (QuantizedWriter, "change_part"),
        (QuantizedWriter, "close"),
        (QuantizedWriter, "close_part"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return left


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> str:
    """The digest of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    quantized(model, folder, recipe_of())
    return digest(folder)


# Two blocks, the final states, before, three steps of three parts and a note, after, three results,
# the verdict, three changes, the end.
@pytest.mark.parametrize("number", [2, 3, 7, 8, 13, 17, 19, 20, 21, 22, 24])
def test_quantize_model_goes_on_where_it_was_killed(model, tmp_path, number, whole):
    folder = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, number)
        with pytest.raises(Killed):
            quantized(model, folder, recipe_of())
    assert not (folder / "quantized.json").exists()
    report = quantized(model, folder, recipe_of())
    assert report["refine"]["kept"]
    assert digest(folder) == whole


def test_quantize_model_writes_as_often_as_these_kills_assume(model, tmp_path, monkeypatch):
    left = kill_at(monkeypatch, 25)
    quantized(model, tmp_path / "r", recipe_of())
    assert left == [0]


def test_quantize_model_that_was_killed_at_the_very_end_leaves_no_steps(model, tmp_path, whole):
    folder = tmp_path / "r"
    quantized(model, folder, recipe_of())
    RefinementState(folder).note(steps=3)
    assert digest(folder) != whole
    quantized(model, folder, recipe_of())
    assert digest(folder) == whole


def test_quantize_model_ends_with_no_steps_that_cannot_be_removed(model, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError("no room to remove it")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr("shutil.rmtree", full)
        quantized(model, tmp_path / "r", recipe_of(steps=1))
    quantized(model, tmp_path / "r", recipe_of(steps=1))
    assert not (tmp_path / "r" / "refinement").exists()


def test_quantize_model_takes_no_finished_step_again(model, tmp_path, monkeypatch):
    folder = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 13)  # in the third step
        with pytest.raises(Killed):
            quantized(model, folder, recipe_of())
    taken = []
    step = RoundedRun.step

    def noted(run, numbers, *more):
        taken.append(numbers)
        return step(run, numbers, *more)

    monkeypatch.setattr(RoundedRun, "step", noted)
    monkeypatch.setattr(refine, "BlockRun", None)  # the unquantized model has run
    quantized(model, folder, recipe_of())
    assert len(taken) == 1


@pytest.mark.parametrize("threads", [2, 3])
def test_quantize_model_refines_to_the_same_bytes_for_any_number_of_threads(
    model, tmp_path, whole, threads
):
    present = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        quantized(model, tmp_path / "r", recipe_of())
    finally:
        torch.set_num_threads(present)
    assert digest(tmp_path / "r") == whole


def test_quantize_model_refines_what_workers_have_rounded(model, tmp_path, whole, workers_here):
    workers_here()
    quantized(model, tmp_path / "r", recipe_of(), Executor(workers=2))
    assert digest(tmp_path / "r") == whole


def test_quantize_model_refines_within_a_budget(model, tmp_path):
    values = RECIPES["gptq"] | {"refine": STEPS, "budget": {"bits_per_weight": 7}}
    report = quantized(model, tmp_path / "r", parse_recipe(values))
    assert [step["step"] for step in report["transforms"]] == ["budget", "quantize", "refine"]
    assert report["refine"]["kept"]


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_safetensors_hold_a_refined_model(model, tmp_path, layout):
    checkpoint, _ = model
    values = RECIPES["awq"] | {"bits": 4, "refine": {"steps": 6, "learning_rate": 0.001}}
    assert quantized(model, tmp_path / "r", parse_recipe(values))["refine"]["kept"]
    store = QuantizedModel(tmp_path / "r")
    (tmp_path / "bundle").mkdir()
    container = SafetensorsContainer()
    variant = Variant(recipe="r", format="safetensors", runtime="transformers", layout=layout)
    container.write(checkpoint, store, tmp_path / "bundle", variant)
    assert differing(container, tmp_path / "bundle", checkpoint, store) == []


def test_transformers_loads_a_refined_model(model, tmp_path):
    checkpoint, _ = model
    values = RECIPES["gptq"] | {"bits": 4, "refine": {"steps": 6, "learning_rate": 0.001}}
    assert quantized(model, tmp_path / "r", parse_recipe(values))["refine"]["kept"]
    store = QuantizedModel(tmp_path / "r")
    (tmp_path / "bundle").mkdir()
    variant = Variant(recipe="r", format="safetensors", runtime="transformers")
    SafetensorsContainer().write(checkpoint, store, tmp_path / "bundle", variant)
    tokens = tokens_of(checkpoint)
    served = torch_logprobs(transformers_model(tmp_path / "bundle"), tokens)
    expected = torch_logprobs(torch_model(checkpoint, store), tokens)
    np.testing.assert_allclose(served, expected, atol=0.05)


def test_layers_whose_codes_are_the_sources_own_stay_as_they_are(model, tmp_path, monkeypatch):
    layer = "model.layers.0.mlp.down_proj"
    report_of = QuantizedWriter.report_of

    def with_codes(writer, part):
        report = report_of(writer, part)
        if report and layer in report["layers"]:
            report["layers"][layer]["codes"] = "the source's own"
        return report

    plain = tmp_path / "plain"
    quantized(model, plain, recipe_of(steps=0))
    monkeypatch.setattr(QuantizedWriter, "report_of", with_codes)
    quantized(model, tmp_path / "r", recipe_of())
    scales = [QuantizedModel(folder).linear(layer).scales for folder in (plain, tmp_path / "r")]
    assert np.array_equal(*scales)


def refused(model, tmp_path, recipe, failure, words) -> None:
    """Assert that a recipe is refused before anything is rounded."""
    with pytest.raises(StageError, match=words) as caught:
        quantized(model, tmp_path / "r", recipe)
    assert caught.value.failure is failure
    assert list((tmp_path / "r").iterdir()) == []


def test_quantize_model_refuses_a_text_of_too_few_sequences(model, tmp_path):
    words = r"^recipes\.r\.refine: expected .* at least 13 sequences.* found 12; set"
    refused(model, tmp_path, recipe_of(sequences=12), Failure.CONFIG_INVALID, words)


def test_quantize_model_refuses_a_calibration_without_tokens(model, tmp_path):
    checkpoint, calibration = model
    folder = shutil.copytree(calibration.folder, tmp_path / "calibration")
    (folder / TOKENS).unlink()
    without = (checkpoint, CalibrationStore(folder))
    words = "expected the tokens .* found nothing; run"
    refused(without, tmp_path, recipe_of(), Failure.MISSING_FILE, words)


def test_quantize_model_refuses_layers_that_the_model_has_in_several_places(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(check, "_problem_of_model", lambda source: "a.b, which is in two places")
    words = r"recipes\.r\.refine, found a\.b, .*; set recipes\.r\.refine\.steps=0"
    refused(model, tmp_path, recipe_of(), Failure.UNSUPPORTED_ARCHITECTURE, words)


def test_problem_of_model_names_what_is_no_layer_of_its_block(model, monkeypatch):
    from quantline.model.block_model import BlockModel

    checkpoint, _ = model
    assert check._problem_of_model(checkpoint) is None
    linears = BlockModel.linears
    monkeypatch.setattr(
        BlockModel, "linears", lambda parts, index: dict(list(linears(parts, index).items())[1:])
    )
    problem = check._problem_of_model(checkpoint)
    assert problem == "model.layers.0.self_attn.q_proj, which is no linear layer of block 0"


def test_refine_names_what_is_not_finite(model, tmp_path, monkeypatch):
    step = RoundedRun.step

    def broken(run, numbers, take, advance):
        step(
            run,
            numbers,
            lambda part, found: take(part, {n: g / 0 for n, g in found.items()}),
            advance,
        )

    monkeypatch.setattr(RoundedRun, "step", broken)
    words = r"the gradient at \S+ in step 1, found NaN .* recipes\.r\.refine\.learning_rate lower"
    with pytest.raises(StageError, match=words) as caught:
        quantized(model, tmp_path / "r", recipe_of())
    assert caught.value.failure is Failure.NON_FINITE


def test_a_safetensors_head_is_the_students(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    checkpoint = Checkpoint(write_model(tmp_path / "m", tie_word_embeddings=False, **sizes))
    calibration = calibrate_into(tmp_path / "c", checkpoint, tokens_of(checkpoint, 6, 12))
    heads = []
    kept = refine._Refinement._heads

    def noted(refinement):
        heads.extend(kept(refinement))
        return tuple(heads)

    monkeypatch.setattr(refine._Refinement, "_heads", noted)
    values = RECIPES["rtn"] | {"refine": STEPS, "embedding_bits": 4, "safetensors_head": True}
    quantized((checkpoint, calibration), tmp_path / "r", parse_recipe(values))
    store = QuantizedModel(tmp_path / "r").with_outside(["lm_head"])
    assert np.array_equal(heads[0].weight.numpy(), store.linear("lm_head").dequantize())
    assert np.array_equal(heads[1].weight.numpy(), checkpoint.tensor("lm_head.weight"))
