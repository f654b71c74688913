"""llama.cpp as a runtime: torch's own greedy decoding, and no file that is damaged."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.container import FILE
from quantline.runtimes.runtime import open_runtime
from tests.helpers.gguf import write_unquantized
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


def test_engine_names_a_file_that_is_cut_short(tmp_path, tiny_model):
    written = write_unquantized(tmp_path, tiny_model, None)
    path = written.bundle / FILE
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(StageError, match="cannot load") as caught:
        open_runtime("llama.cpp", written.bundle, 1)
    assert caught.value.failure == Failure.RUNTIME_CRASHED
