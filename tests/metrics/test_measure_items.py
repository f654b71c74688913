"""Measuring by workers: the same figures as by one process."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantline.config.executor import Executor
from quantline.config.texts import Limits, Speed
from quantline.errors import Failure, StageError
from quantline.metrics import measure, measure_items, measuring_process
from quantline.metrics.gold_set import GoldResult, TokenizedItem
from quantline.metrics.measure_items import measure_by_workers
from quantline.metrics.measuring_process import Measuring, measure_in_child
from quantline.metrics.quality import rows_of_part
from quantline.runtimes.runtime import LogitChunk

VOCABULARY, HIDDEN, LENGTH, SEQUENCES = 23, 6, 10, 11
TOGETHER = 2
SPEED = Speed(prompt_tokens=4, new_tokens=2, repetitions=1)
ITEMS = [
    TokenizedItem("a", "t", "one", "two", "forced", [1, 2], [[3, 4]], 0, [1]),
    TokenizedItem("b", "t", "one", "two", "choices", [5], [[3], [4, 6], [7]], 1, [1, 2, 1]),
    TokenizedItem("c", "u", "one", "9", "generated", [5, 6], [], 0, [], max_tokens=3),
]


class Model:
    """A runtime whose logits follow from the token, and from the batch that it is in.

    So a part that divides a batch has other figures.
    """

    name, version, device = "model", "1.0", "cpu"

    def __init__(self, bundle: Path, threads: int | None) -> None:
        self.table = np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY))

    def _logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.float32(self.table[tokens] + 1e-3 * tokens.mean())

    def sequences_at_once(self, length: int) -> int:
        return TOGETHER

    def logit_chunks(self, tokens, first, end):
        """The second half of the positions comes first."""
        middle = (first + end) // 2
        for start in range(0, len(tokens), TOGETHER):
            rows = slice(start, min(len(tokens), start + TOGETHER))
            logits = self._logits(tokens[rows])
            for positions in (slice(middle, end), slice(first, middle)):
                yield LogitChunk(rows, positions, logits[:, positions])

    def logprobs(self, tokens):
        logits = self._logits(tokens)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def generate(self, prompt, max_new_tokens, stop):
        return [int(self.table[prompt[-1]].argmax())] * max_new_tokens

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture
def measuring(tmp_path, monkeypatch) -> Measuring:
    """A bundle of that runtime, which is measured in this process."""
    draw = np.random.default_rng(0)
    reference = tmp_path / "reference"
    bundle = tmp_path / "bundle"
    for folder in (reference, bundle):
        folder.mkdir()
    (bundle / "weights").touch()
    tokens = draw.integers(0, VOCABULARY, (SEQUENCES, LENGTH)).astype(np.int32)
    hidden = draw.normal(size=(SEQUENCES, LENGTH, HIDDEN)).astype(np.float32)
    save_file({"hidden": hidden, "tokens": tokens}, reference / "hidden.safetensors")
    weight = draw.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    save_file({"weight": weight}, reference / "head.safetensors")
    (reference / "reference.json").write_text(
        json.dumps({"logit_scale": 1.0, "logit_softcap": None})
    )
    lines = "".join(json.dumps(asdict(item)) + "\n" for item in ITEMS)
    (reference / "gold.jsonl").write_text(lines)
    baseline = [GoldResult(item.id, item.task, True, [-1.0], "x").as_dict() for item in ITEMS]
    (reference / "baseline.json").write_text(json.dumps(baseline))
    monkeypatch.setattr(measure, "engine_class", lambda name: Model)
    monkeypatch.setattr(measure, "open_runtime", lambda name, bundle, threads: Model(bundle, 1))

    def call_here(function, arguments, *rest):
        answer = getattr(measure, function.partition(":")[2])(**arguments)
        return json.loads(json.dumps(answer))

    monkeypatch.setattr(measuring_process, "call_in_child", call_here)
    return Measuring(bundle, "model", reference, Limits())


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_measure_the_same_figures(measuring, tmp_path, workers_here, workers):
    alone = measure_in_child(measuring, SPEED)
    assert alone["quality"]["tokens"] == SEQUENCES * (LENGTH - 1)
    assert alone["quality"]["gold_items"] == len(ITEMS)
    used = workers_here(lambda number: number % 3 == 1)
    executor = Executor(workers=workers, attempts=9)
    found = measure_by_workers(measuring, SPEED, executor, tmp_path / "made")
    assert found["quality"] == alone["quality"]
    assert found["items"] == alone["items"]
    assert found["runtime_version"] == alone["runtime_version"]
    assert set(found["speed"]) == set(alone["speed"])
    assert used[0].started
    assert not (tmp_path / "made").exists()


def test_workers_measure_without_questions(measuring, tmp_path, workers_here):
    (measuring.reference / "gold.jsonl").write_text("")
    workers_here()
    alone = measure_in_child(measuring, SPEED)
    found = measure_by_workers(measuring, SPEED, Executor(workers=2), tmp_path / "made")
    assert (found["quality"], found["items"]) == (alone["quality"], [])


def test_a_failure_of_a_part_has_its_name(measuring, tmp_path, workers_here, monkeypatch):
    def too_small(self, tokens):
        return Model._logits(self, tokens)[..., :-1]

    monkeypatch.setattr(measure, "open_runtime", lambda *arguments: Small(*arguments[1:]))
    Small = type("Small", (Model,), {"_logits": too_small})
    workers_here()
    with pytest.raises(StageError, match="expected at least 23 logits") as caught:
        measure_by_workers(measuring, SPEED, Executor(workers=2), tmp_path / "made")
    assert caught.value.failure is Failure.TOKENIZER_MISMATCH


def test_questions_beyond_a_small_vocabulary_are_named_as_by_one_process(
    measuring, tmp_path, workers_here, monkeypatch
):
    far = TokenizedItem("far", "t", "one", "two", "forced", [1], [[VOCABULARY - 1]], 0, [1])
    (measuring.reference / "gold.jsonl").write_text(json.dumps(asdict(far)) + "\n")
    Small = type("Small", (Model,), {"_logits": lambda *given: Model._logits(*given)[..., :-1]})
    monkeypatch.setattr(measure, "open_runtime", lambda *arguments: Small(*arguments[1:]))
    workers_here()
    with pytest.raises(StageError, match="expected at least 23 logits") as caught:
        measure_by_workers(measuring, SPEED, Executor(workers=2), tmp_path / "made")
    assert caught.value.failure is Failure.TOKENIZER_MISMATCH


@pytest.mark.parametrize("what, value", [("version", "2.0"), ("device", "cuda")])
def test_a_worker_with_another_runtime_stops(
    measuring, tmp_path, workers_here, monkeypatch, what, value
):
    opened = []

    def open_another(name, bundle, threads):
        model = Model(bundle, threads)
        if opened:
            setattr(model, what, value)
        opened.append(model)
        return model

    monkeypatch.setattr(measure, "open_runtime", open_another)
    workers_here()
    with pytest.raises(StageError, match=rf"found {value}; give all machines") as caught:
        measure_by_workers(measuring, SPEED, Executor(workers=2), tmp_path / "made")
    assert caught.value.failure is Failure.ARTIFACT_CHANGED


def test_without_a_gpu_for_each_one_worker_has_the_gpu(
    measuring, tmp_path, workers_here, monkeypatch, capsys
):
    monkeypatch.setattr(Model, "device", "cuda")
    used = workers_here()
    alone = measure_in_child(measuring, SPEED)
    found = measure_by_workers(measuring, SPEED, Executor(workers=2), tmp_path / "made")
    assert found["quality"] == alone["quality"]
    assert len(used[0].started) == 1
    assert "one worker of this machine measures it" in "".join(capsys.readouterr())


def test_a_worker_that_sees_another_bundle_stops(measuring, tmp_path, workers_here, monkeypatch):
    calls = []
    inputs = measure_items._inputs

    def other_on_the_worker(*arguments):
        calls.append(arguments)
        return inputs(*arguments) | ({"bundle": "another"} if len(calls) > 1 else {})

    monkeypatch.setattr(measure_items, "_inputs", other_on_the_worker)
    workers_here()
    with pytest.raises(StageError, match=r"expected on \S+ the bundle of the stage") as caught:
        measure_by_workers(measuring, SPEED, Executor(workers=2), tmp_path / "made")
    assert caught.value.failure is Failure.ARTIFACT_CHANGED


def test_parts_divide_no_batch_and_leave_nothing_out():
    for count in (1, 5, 64):
        for together in (1, 2, 16, 100):
            for parts in (1, 2, 3, 7):
                bounds = [rows_of_part(count, together, (n, parts)) for n in range(parts)]
                assert bounds[0][0] == 0 and bounds[-1][1] == count
                for (_, end), (start, _) in pairwise(bounds):
                    assert end == start and (end % together == 0 or end == count)
