"""A k-quant recipe on a whole model: the file is llama.cpp's own, with overrides and importance matrices from both sides."""

import gguf as package
import llama_quantize
import numpy as np
import pytest
from gguf import GGUFReader
from rounded import rounded, tokens_of

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized, QuantizedWriter
from quantline.calibration.collect import ABOUT, Moments, collect
from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from stages.export import check_container
from quantline.formats.gguf import container as gguf, imatrix
from quantline.recipes.dispatch import round_block
from quantline.recipes.tensor_types import Mixture
from quantline.recipes.context import Work
from quantline.config.recipes import KQuant
from quantline.errors import Failure, StageError
from quantline.files import write_json

VARIANT = Variant(recipe="r", format="gguf", runtime="llama.cpp")


def prepared(folder, source):
    """(checkpoint, its calibration, its 32-bit file)."""
    checkpoint = Checkpoint(source)
    (folder / "calibration").mkdir()
    tokens = tokens_of(checkpoint, 3, 33)
    about = {"layers": collect(checkpoint, tokens, folder / "calibration"), "curvature": False, "text_sha256": "0" * 64,
             "tokens": tokens.size, "seed": 0, "text": "a/text.txt", "sequences": 3, "length": 33}
    write_json(folder / "calibration" / ABOUT, about)
    (folder / "plain").mkdir()
    gguf.write(checkpoint, rounded(folder / "none", checkpoint, bits=0), folder / "plain",
               VARIANT.model_copy(update={"dtype": "float32"}))
    return checkpoint, Moments(folder / "calibration"), folder / "plain" / gguf.FILE


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    """A dense model."""
    folder = tmp_path_factory.mktemp("mixture")
    return prepared(folder, make_model(folder / "model", intermediate_size=256, num_hidden_layers=3))


def made(model, folder, mix: str, **recipe) -> Quantized:
    """What the quantize stage writes for a recipe."""
    checkpoint, moments, _ = model
    facts, recipe = architecture(checkpoint), KQuant(method="kquant", mix=mix, **recipe)
    folder.mkdir()
    work = Work(recipe, checkpoint, facts, moments, QuantizedWriter(folder))
    reports = {}
    for layer in [*range(facts.layers), None]:
        done = round_block(work, layer)
        work.writer.close_part("rest" if layer is None else f"block-{layer:03d}", done)
        reports |= done["layers"]
    work.writer.close({"recipe": {"name": "r", **recipe.model_dump(mode="json")}, "transforms": [], "tensors": reports,
                       "calibration": moments.provenance(), "importance": work.mixture.write_importance(folder)})
    return Quantized(folder)


def exported(model, quantized: Quantized, folder):
    folder.mkdir()
    requested = gguf.write(model[0], quantized, folder, VARIANT)
    return requested, {tensor.name: tensor for tensor in GGUFReader(folder / gguf.FILE).tensors}


def values(path) -> dict[str, np.ndarray]:
    """An importance matrix as llama-quantize reads it (tools/quantize/quantize.cpp, load_imatrix)."""
    there = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    return {name.removesuffix(".in_sum2"): sums / there[name.replace(".in_sum2", ".counts")].reshape(-1, 1)
            for name, sums in there.items() if name.endswith(".in_sum2")}


def same_bytes(ours: dict, path) -> None:
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(np.asarray(ours[name].data).view(np.uint8), np.asarray(tensor.data).view(np.uint8)), name


@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ3_XXS", "Q4_0"])
def test_our_importance_matrix_gives_llama_cpp_the_same_file(model, mix, tmp_path):
    quantized = made(model, tmp_path / "quantized", mix)
    status, said = llama_quantize.quantize(model[2], tmp_path / "theirs.gguf", mix, values(tmp_path / "quantized" / imatrix.FILE))
    assert status == 0, said
    same_bytes(exported(model, quantized, tmp_path / "out")[1], tmp_path / "theirs.gguf")


@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ2_S", "MXFP4_MOE"])
def test_experts_share_a_tensor_and_have_an_importance_each(mix, tmp_path, make_model):
    model = prepared(tmp_path, make_model(tmp_path / "model", "mixtral", intermediate_size=256, num_hidden_layers=1,
                                          num_local_experts=4, tie_word_embeddings=False))
    quantized = made(model, tmp_path / "quantized", mix)
    requested, there = exported(model, quantized, tmp_path / "out")
    matrix = values(tmp_path / "quantized" / imatrix.FILE)
    assert matrix["blk.0.ffn_down_exps.weight"].shape == (4, 256) and len(np.unique(matrix["blk.0.ffn_down_exps.weight"], axis=0)) == 4
    assert llama_quantize.quantize(model[2], tmp_path / "theirs.gguf", mix, matrix)[0] == 0
    same_bytes(there, tmp_path / "theirs.gguf")
    told = check_container(gguf, tmp_path / "out", model[0], quantized, requested, fail_on_substitution=True)
    assert len(told) == len(model[0].names)


def test_the_importance_matrix_is_the_mean_square_of_the_inputs_in_the_tools_format(model, tmp_path):
    made(model, tmp_path / "quantized", "Q4_K_M")
    path, moments = tmp_path / "quantized" / imatrix.FILE, model[1]
    reader = GGUFReader(path)
    assert {key: reader.fields[key].contents() for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count",
            "imatrix.chunk_size")} == {"general.type": "imatrix", "imatrix.datasets": ["a/text.txt"],
                                       "imatrix.chunk_count": 3, "imatrix.chunk_size": 33}
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert len(shapes) == 2 * 3 * 7
    assert shapes["blk.2.ffn_down.weight.in_sum2"] == (256, 1) and shapes["blk.2.ffn_down.weight.counts"] == (1, 1)
    for place, source in (("blk.0.attn_q", "0.self_attn.q_proj"), ("blk.2.ffn_down", "2.mlp.down_proj")):
        diagonal = np.diagonal(moments.moment(f"model.layers.{source}"))
        np.testing.assert_allclose(values(path)[f"{place}.weight"], diagonal[None], rtol=1e-6)
        assert np.array_equal(imatrix.read(path).entries[f"{place}.weight"].values(), values(path)[f"{place}.weight"])


def test_the_file_says_where_its_importance_matrix_comes_from(model, tmp_path):
    exported(model, made(model, tmp_path / "quantized", "Q4_K_M"), tmp_path / "out")
    fields = GGUFReader(tmp_path / "out" / gguf.FILE).fields
    assert {key: fields[f"quantize.imatrix.{key}"].contents() for key in ("file", "dataset", "entries_count", "chunks_count")} \
        == {"file": "imatrix.gguf", "dataset": "a/text.txt", "entries_count": 21, "chunks_count": 3}
    assert fields["general.file_type"].contents() == package.LlamaFileType.MOSTLY_Q4_K_M
    exported(model, made(model, tmp_path / "without", "Q4_K_M", importance=False), tmp_path / "plain")
    assert "quantize.imatrix.file" not in GGUFReader(tmp_path / "plain" / gguf.FILE).fields
    assert not (tmp_path / "without" / imatrix.FILE).exists()


def test_an_importance_matrix_of_the_tool_is_used_in_place_of_the_calibration(model, tmp_path):
    checkpoint, _, source = model
    names, draw = gguf.tensor_names(checkpoint, architecture(checkpoint)), np.random.default_rng(0)
    entries = {place: imatrix.Entry(draw.gamma(1, 50, (1, checkpoint.shape(name)[-1])).astype(np.float32), np.float32([50]))
               for name, place in names.items() if place.startswith("blk.") and len(checkpoint.shape(name)) > 1}
    imatrix.write(tmp_path / "given.gguf", imatrix.ImportanceMatrix(entries, ("b",), 2, 25), "llama")
    quantized = made(model, tmp_path / "quantized", "Q4_K_M", importance_file=str(tmp_path / "given.gguf"))
    assert llama_quantize.quantize(source, tmp_path / "theirs.gguf", "Q4_K_M", values(tmp_path / "given.gguf"))[0] == 0
    same_bytes(exported(model, quantized, tmp_path / "out")[1], tmp_path / "theirs.gguf")
    assert quantized.report["importance"]["file"].endswith("given.gguf")


def tampered(model, path, how) -> KQuant:
    """A recipe with an importance matrix in which something is wrong."""
    entries = dict(Mixture(KQuant(method="kquant", mix="Q4_K_M"), model[0], architecture(model[0]), model[1]).matrix.entries)
    how(entries)
    imatrix.write(path, imatrix.ImportanceMatrix(entries, ("b",), 2, 25), "llama")
    return KQuant(method="kquant", mix="Q4_K_M", importance_file=str(path))


def entry(sums, counts=(4,)) -> imatrix.Entry:
    return imatrix.Entry(np.float32(sums), np.float32(counts))


ROW, PLACE = np.ones((1, 256)), "blk.1.attn_v.weight"
BAD = {
    "missing": (lambda entries: entries.pop(PLACE), Failure.IMPORTANCE_MISSING, f"an entry for {PLACE}"),
    "NaN": (lambda entries: entries.update({PLACE: entry(ROW * np.nan)}), Failure.IMPORTANCE_INVALID, f"{PLACE}.in_sum2"),
    "infinite": (lambda entries: entries.update({PLACE: entry(ROW * np.inf)}), Failure.IMPORTANCE_INVALID, "infinity"),
    "negative": (lambda entries: entries.update({PLACE: entry(-ROW)}), Failure.IMPORTANCE_INVALID, "not negative"),
    "narrow": (lambda entries: entries.update({PLACE: entry(ROW[:, :32])}), Failure.IMPORTANCE_INVALID, "256 numbers"),
    "several": (lambda entries: entries.update({PLACE: entry(np.ones((2, 256)), (4, 4))}), Failure.IMPORTANCE_INVALID, "256"),
    "no tokens": (lambda entries: entries.update({PLACE: entry(ROW, (0,))}), Failure.IMPORTANCE_INVALID, "tokens that"),
    "NaN tokens": (lambda entries: entries.update({PLACE: entry(ROW, (np.nan,))}), Failure.IMPORTANCE_INVALID, ".counts"),
    "empty": (lambda entries: entries.clear(), Failure.IMPORTANCE_INVALID, "entries, found none"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_importance_matrix_is_a_named_failure(model, name, tmp_path):
    how, failure, words = BAD[name]
    recipe = tampered(model, tmp_path / "bad.gguf", how)
    with pytest.raises(StageError, match=words) as caught:
        made(model, tmp_path / "quantized", "Q4_K_M", importance_file=recipe.importance_file)
    assert caught.value.failure == failure


@pytest.mark.parametrize(("content", "failure"), [
    (None, Failure.MISSING_FILE), (b"", Failure.IMPORTANCE_INVALID), (b"GGUF" + b"\xff" * 40, Failure.IMPORTANCE_INVALID),
    ("a model", Failure.IMPORTANCE_INVALID)])
def test_what_is_no_importance_matrix_is_a_named_failure(model, content, failure, tmp_path):
    path = model[2] if content == "a model" else tmp_path / "bad.gguf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(StageError, match=str(path)) as caught:
        imatrix.read(path)
    assert caught.value.failure == failure


def test_sums_without_counts_are_refused(tmp_path):
    writer = package.GGUFWriter(tmp_path / "bad.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["b"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StageError, match=r"attn_q\.weight\.counts in F32, found no tensor"):
        imatrix.read(tmp_path / "bad.gguf")


@pytest.mark.parametrize("mix", ["IQ2_XS", "IQ3_XXS", "Q2_K_S"])
def test_a_mix_that_is_garbage_without_an_importance_matrix_is_refused_by_name(model, mix, tmp_path):
    with pytest.raises(StageError, match=r"garbage without one.*importance: true") as caught:
        made(model, tmp_path / "quantized", mix, importance=False)
    assert caught.value.failure == Failure.IMPORTANCE_MISSING


OVERRIDES = {r"blk\.[02]\.ffn_up": "Q8_0", "attn_k": "F16", "token_embd": "Q5_K"}


def test_overrides_take_precedence_as_in_llama_cpp_and_are_what_the_file_holds(model, tmp_path):
    quantized = made(model, tmp_path / "quantized", "Q4_K_M", overrides=OVERRIDES)
    requested, there = exported(model, quantized, tmp_path / "out")
    theirs = llama_quantize.types(model[2], "Q4_K_M", importance=True, overrides=OVERRIDES)
    assert {name: tensor.tensor_type.name for name, tensor in there.items()} == theirs
    assert [theirs[f"blk.{layer}.ffn_up.weight"] for layer in range(3)] == ["Q8_0", "Q4_K", "Q8_0"]
    told = check_container(gguf, tmp_path / "out", model[0], quantized, requested, fail_on_substitution=True)
    up = told["model.layers.2.mlp.up_proj.weight"]
    assert (up["requested"], up["actual"]) == ("Q8_0", "Q8_0") and told["model.embed_tokens.weight"]["actual"] == "Q5_K"


@pytest.mark.parametrize(("pattern", "words"), [("attn_(", "regular expression"), ("attn_x", "it fits none"),
                                                ("attn_norm", "it fits none")])
def test_an_override_that_fits_nothing_is_refused(model, pattern, words, tmp_path):
    with pytest.raises(StageError, match=words) as caught:
        made(model, tmp_path / "quantized", "Q4_K_M", overrides={pattern: "Q8_0"})
    assert caught.value.failure == Failure.CONFIG_INVALID


def test_widths_that_no_block_divides_are_what_llama_cpp_makes_of_them(tmp_path, tiny_narrow):
    model = prepared(tmp_path, tiny_narrow)
    quantized = made(model, tmp_path / "quantized", "IQ4_XS")
    requested, there = exported(model, quantized, tmp_path / "out")
    status, said = llama_quantize.quantize(model[2], tmp_path / "theirs.gguf", "IQ4_XS", values(tmp_path / "quantized" / imatrix.FILE))
    assert status == 0, said
    same_bytes(there, tmp_path / "theirs.gguf")
    kinds = {tensor.tensor_type.name for tensor in there.values()}
    assert kinds == {"F32", "F16", "IQ4_NL", "Q8_0"}  # rows of 176 and 64
    with pytest.raises(StageError, match="found F16|found IQ4_NL|found Q8_0") as caught:
        check_container(gguf, tmp_path / "out", model[0], quantized, requested, fail_on_substitution=True)
    assert caught.value.failure == Failure.TYPE_SUBSTITUTED


def test_an_override_that_no_row_fits_is_told_or_refused(tmp_path, tiny_narrow, monkeypatch):
    checkpoint = Checkpoint(tiny_narrow)
    facts = architecture(checkpoint)
    recipe = KQuant(method="kquant", mix="Q8_0", importance=False, overrides={"ffn_down": "Q6_K", "ffn_up": "IQ4_XS"})
    (tmp_path / "quantized").mkdir()
    work = Work(recipe, checkpoint, facts, None, QuantizedWriter(tmp_path / "quantized"))
    found = {name: work.mixture.types(name) for name in checkpoint.names}
    assert found["model.layers.0.mlp.down_proj.weight"] == ("Q6_K", "F16")  # 176 is no multiple of 32
    assert found["model.layers.0.mlp.up_proj.weight"] == ("IQ4_XS", "IQ4_NL")
