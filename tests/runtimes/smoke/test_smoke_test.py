"""The smoke test of a bundle: JSON in and out, and a name for everything that is wrong."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantline.errors import StageError
from quantline.files import write_json
from quantline.formats.safetensors.container import SafetensorsContainer
from quantline.metrics.source_answers import MOST_TOKENS, answer_prompts
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.smoke import smoke_test as smoke
from quantline.text.tokenizer import Tokenizer
from tests.helpers.bundles import REPEATABLE, SMOKE_CHECKS, settled
from tests.helpers.project import ROOT
from tests.helpers.quantized import rounded
from tests.helpers.variants import write_variant

PROMPTS = ["ada met hugo", "the river"]
COUNTER = itertools.count()
IMPORTS = """
import json
import sys

from quantline.runtimes.smoke.smoke_test import smoke_test

smoke_test(**json.loads(sys.argv[1]))
print(json.dumps(sorted({"torch", "transformers", "onnx"} & set(sys.modules))))
"""


@pytest.fixture
def arguments(tiny_model):
    """The source's own folder as a safetensors bundle."""
    return {
        "bundle": str(tiny_model),
        "model": str(tiny_model),
        "format": "safetensors",
        "runtime": "transformers",
        "answers": answer_prompts(Checkpoint(tiny_model), PROMPTS, 4),
        "tokens": 4,
        "exact": True,
        "rows": 384,
        "threads": 1,
    }


class Broken:
    """A runtime that is right but for one thing."""

    def __init__(self, engine, changes):
        self.engine = engine
        self.changes = changes

    def __getattr__(self, name):
        return self.changes.get(name) or getattr(self.engine, name)


def break_runtime(monkeypatch, **changes):
    open_runtime = smoke.open_runtime
    monkeypatch.setattr(smoke, "open_runtime", lambda *given: Broken(open_runtime(*given), changes))


def test_smoke_test_returns_smoke_json(arguments):
    trace = smoke.smoke_test(**json.loads(json.dumps(arguments)))
    assert json.loads(json.dumps(trace)) == trace
    assert set(trace) == {
        "runtime",
        "runtime_version",
        "device",
        "helped",
        "tokenizer",
        "passed",
        "prompts",
    }
    assert (trace["runtime"], trace["passed"]) == ("transformers", True)
    assert [entry["prompt"] for entry in trace["prompts"]] == PROMPTS
    for entry in trace["prompts"]:
        assert set(entry) == {
            "prompt",
            "output",
            "token_ids",
            "source_output",
            "source_distance",
            "seconds",
            "checks",
            "passed",
        }
        assert entry["output"] == entry["source_output"]
        assert entry["source_distance"] < 0.1
        assert len(entry["token_ids"]) == 4
        assert entry["seconds"] > 0
        assert entry["passed"]
    first, *others = (entry["checks"] for entry in trace["prompts"])
    assert first == dict.fromkeys((*SMOKE_CHECKS, REPEATABLE), True)  # all answers are as long
    assert others == [dict.fromkeys(SMOKE_CHECKS, True)] * (len(PROMPTS) - 1)
    tokenizer = trace["tokenizer"]
    assert set(tokenizer) == {
        "texts_compared",
        "texts_given",
        "texts_differing",
        "special_tokens",
        "chat_template",
        "ends",
    }
    assert tokenizer["ends"] == [0]
    assert tokenizer["texts_compared"] == tokenizer["texts_given"] > 20
    assert tokenizer["texts_differing"] == []
    assert tokenizer["special_tokens"]
    assert tokenizer["chat_template"]


def nan_logprobs(tokens):
    return np.full((*tokens.shape, 384), np.nan, np.float32)


def narrow_logprobs(tokens):
    return np.zeros((*tokens.shape, 380), np.float32)


@pytest.mark.parametrize(
    ("changes", "failure", "words"),
    [
        ({"logprobs": nan_logprobs}, "smoke_failed", "failed finite"),
        ({"generate": lambda ids, count, stop: []}, "smoke_failed", "failed non_empty"),
        (
            {"generate": lambda ids, count, stop: [next(COUNTER) % 300]},
            "smoke_failed",
            "failed repeatable",
        ),
        ({"logprobs": narrow_logprobs}, "smoke_failed", "failed vocabulary"),
        ({"encode": lambda text: [1, 2, 3]}, "tokenizer_mismatch", "[1, 2, 3] instead of"),
        ({"encode_whole": lambda text: [0, 68]}, "tokenizer_mismatch", "to put [] before"),
        ({"stops_at": lambda token: False}, "tokenizer_mismatch", "'<|endoftext|>' (0)"),
    ],
)
def test_smoke_test_fails_where_the_runtime_misbehaves(
    arguments, monkeypatch, changes, failure, words
):
    break_runtime(monkeypatch, **changes)
    with pytest.raises(StageError) as caught:
        smoke.smoke_test(**arguments)
    assert caught.value.failure == failure
    assert words in str(caught.value)


def silent_model(tiny_model, folder) -> tuple[Path, list[dict]]:
    """Return a model whose first token after each prompt is an end, and its answers."""
    shutil.copytree(tiny_model, folder)
    spoken = answer_prompts(Checkpoint(tiny_model), PROMPTS, 1)
    ends = sorted({0, *(answer["token_ids"][0] for answer in spoken)})
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return folder, answer_prompts(Checkpoint(folder), PROMPTS, 4)


def test_a_model_that_answers_nothing_passes(arguments, monkeypatch, tiny_model, tmp_path):
    folder, answers = silent_model(tiny_model, tmp_path / "silent")
    assert [answer["token_ids"] for answer in answers] == [[], []]
    assert all(answer["ended"] in answer["end"] for answer in answers)
    arguments |= {"bundle": str(folder), "model": str(folder), "answers": answers}
    trace = smoke.smoke_test(**arguments)
    assert [entry["output"] for entry in trace["prompts"]] == ["", ""]
    # A quantized variant may say something where the unquantized model says nothing.
    break_runtime(monkeypatch, generate=lambda ids, count, stop: [5, 6])
    assert smoke.smoke_test(**arguments | {"exact": False})["passed"]


def test_an_end_that_is_as_likely_as_a_token_may_come_first(arguments, monkeypatch):
    break_runtime(monkeypatch, generate=lambda ids, count, stop: [])
    for answer in arguments["answers"]:
        answer["end_gap"] = 0.9 * smoke.NEAR
    assert smoke.smoke_test(**arguments)["passed"]
    for gap in (1.1 * smoke.NEAR, None):
        arguments["answers"][1]["end_gap"] = gap
        with pytest.raises(StageError, match="it answers nothing, where the unquantized model"):
            smoke.smoke_test(**arguments)


def test_one_token_again_and_again_is_right_where_the_source_says_it(arguments, monkeypatch):
    break_runtime(monkeypatch, generate=lambda ids, count, stop: [7] * count)
    arguments |= {"tokens": MOST_TOKENS, "exact": False}
    with pytest.raises(StageError, match="failed varied"):
        smoke.smoke_test(**arguments)
    for answer in arguments["answers"]:
        answer["token_ids"] = [9] * MOST_TOKENS
    assert smoke.smoke_test(**arguments)["passed"]


def test_weights_that_are_not_rounded_have_to_agree_with_the_source(arguments, monkeypatch):
    for answer in arguments["answers"]:
        answer["token_ids"] = [(token + 7) % 384 for token in answer["token_ids"]]
    with pytest.raises(StageError, match="failed like_source"):
        smoke.smoke_test(**arguments)
    assert smoke.smoke_test(**arguments | {"exact": False})["passed"]


def test_smoke_test_reports_a_tokenizer_that_may_differ(arguments, monkeypatch, tiny_model):
    right = Tokenizer(tiny_model).encode
    wrong = [1, 2, 3]
    break_runtime(
        monkeypatch,
        encode=lambda text: wrong if "Русский" in text or text in PROMPTS else right(text),
    )
    trace = smoke.smoke_test(**arguments, exact_tokenizer=False)
    tokenizer = trace["tokenizer"]
    assert [text[:7] for text in tokenizer["texts_differing"]] == ["ada met", "the riv", "Русский"]
    assert tokenizer["texts_compared"] > 20
    assert all(entry["checks"]["tokenizer_parity"] for entry in trace["prompts"])


@pytest.mark.parametrize(("key", "value"), [("eos", 7), ("chat_template", "another")])
def test_smoke_test_refuses_other_tokenizer_metadata(arguments, monkeypatch, key, value):
    metadata = SafetensorsContainer.tokenizer_metadata

    def changed(container, folder):
        return metadata(container, folder) | {key: value}

    monkeypatch.setattr(SafetensorsContainer, "tokenizer_metadata", changed)
    words = f"expected {key} .* in the bundle, found {value!r}"
    with pytest.raises(StageError, match=words) as caught:
        smoke.smoke_test(**arguments)
    assert caught.value.failure == "tokenizer_mismatch"


def test_smoke_test_imports_no_more_than_the_runtime_does(arguments, tmp_path):
    model = settled(shutil.copytree(arguments["model"], tmp_path / "model"))
    source = Checkpoint(model)
    write_variant("onnx", tmp_path / "out", source, rounded(tmp_path / "q", source, bits=0))
    bundle = {"bundle": str(tmp_path / "out"), "format": "onnx", "runtime": "onnxruntime"}
    bundle["model"] = str(model)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps(arguments | bundle)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout) == []
