"""llama.cpp as a runtime: torch's own greedy decoding, and no file that is damaged."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.runtimes import llama_cpp
from quantline.runtimes.llama_cpp_log import Log
from quantline.runtimes.runtime import open_runtime
from tests.helpers.gguf import file_of, write_unquantized
from tests.helpers.quantized import torch_logprobs, torch_model


def test_generate_is_greedy_decoding_by_torch(tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, "float32")
    runtime = open_runtime("llama.cpp", written.bundle, 1)
    prompt = [5, 80, 33]
    found = runtime.generate(prompt, 6, set())
    model = torch_model(written.source, written.quantized)
    ids = list(prompt)
    for _ in range(6):
        logprobs = torch_logprobs(model, np.array([ids], np.int32))
        ids.append(int(logprobs[0, -1].argmax()))
    assert found == ids[3:]
    assert runtime.generate(prompt, 6, {found[2]}) == found[: found.index(found[2])]


def test_a_file_larger_than_memory_stays_in_place_and_the_figures_say_so(
    tmp_path, tiny_model, monkeypatch
):
    written = write_unquantized(tmp_path, tiny_model, "float32")
    tokens = np.array([[5, 80, 33]], np.int32)
    usual = open_runtime("llama.cpp", written.bundle, 1)
    size = file_of(written.bundle).stat().st_size
    monkeypatch.setattr(llama_cpp, "allowed_bytes", lambda: size + llama_cpp.BESIDE_WEIGHTS - 1)
    runtime = open_runtime("llama.cpp", written.bundle, 1)
    assert runtime.version == usual.version + ", weights read from the file, larger than memory"
    np.testing.assert_allclose(runtime.logprobs(tokens), usual.logprobs(tokens), atol=1e-4)


def test_engine_names_a_file_that_is_cut_short(tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, None)
    path = file_of(written.bundle)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(
        StageError, match=r"llama\.cpp says: .*not within the file bounds"
    ) as caught:
        open_runtime("llama.cpp", written.bundle, 1)
    assert caught.value.failure == Failure.RUNTIME_CRASHED


def test_engine_quotes_the_reason_for_which_llama_cpp_refuses_a_file(tmp_path, tiny_model):
    """The reason of this file, also after another file was refused for another one."""
    written = write_unquantized(tmp_path, tiny_model, None)
    path = file_of(written.bundle)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    with pytest.raises(StageError):
        open_runtime("llama.cpp", written.bundle, 1)
    path.write_bytes(whole.replace(b"output_norm.weight", b"output_norm.weighx"))
    with pytest.raises(StageError, match=r"tensor 'output_norm.weight' not found") as caught:
        open_runtime("llama.cpp", written.bundle, 1)
    assert "bounds" not in str(caught.value)
    path.write_bytes(whole)
    open_runtime("llama.cpp", written.bundle, 1)


def test_log_keeps_the_last_errors_and_nothing_else():
    log = Log()
    assert log.reason() == "it gave no reason"
    for level, text in (
        (2, b"info\n"),
        (4, b"first\n"),
        (4, b"half "),
        (5, b"a line\n"),
        (3, b"w"),
    ):
        log.hear(level, text, None)
    log.hear(5, b"more of the warning", None)
    assert log.reason() == "first; half a line"
    log.clear()
    assert log.reason() == "it gave no reason"
