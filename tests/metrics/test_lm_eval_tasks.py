"""What lm-evaluation-harness gives, what is kept of it, and what is refused."""

import json

import pytest

from quantline.errors import Failure, StageError
from quantline.metrics import lm_eval_tasks
from quantline.metrics.lm_eval_tasks import context_length, run_tasks, task_metrics


def harness_results(**values) -> dict:
    task = {
        "alias": "a",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "bleu,first": 3,
        "bleu_stderr,first": "N/A",
        "n": 7,
    }
    return {
        "results": {"a": task | values},
        "versions": {"a": 2.0},
        "n-shot": {"a": 5},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "higher_is_better": {"a": {"acc": True}},
    }


def test_task_metrics_keeps_metrics_with_their_errors():
    assert task_metrics(harness_results(), limit=4, chat=False) == {
        "a": {
            "metrics": {
                "acc,none": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
                "bleu,first": {"value": 3.0, "stderr": None, "higher_is_better": None},
            },
            "version": 2.0,
            "fewshot": 5,
            "documents": 4,
            "limit": 4,
            "chat": False,
        }
    }


def test_task_metrics_refuses_a_metric_that_is_not_finite():
    results = harness_results(**{"acc,none": float("nan")})
    with pytest.raises(StageError, match="expected a finite acc of a, found nan") as error:
        task_metrics(results, limit=None, chat=False)
    assert error.value.failure == Failure.NON_FINITE


def test_context_length_is_what_the_configuration_says(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"n_positions": 64}))
    assert context_length(tmp_path) == 64
    path.write_text(json.dumps({"n_positions": 64, "max_position_embeddings": 128}))
    assert context_length(tmp_path) == 128
    path.write_text("{}")
    with pytest.raises(StageError, match="found none; give --max-length"):
        context_length(tmp_path)


def test_run_tasks_says_how_to_install_the_harness(monkeypatch):
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"pip install 'quantline\[lm-eval\]'") as error:
        run_tasks(
            bundle="bundle",
            runtime="llama.cpp",
            model="model",
            tasks=["arc_easy"],
            include_path=None,
            fewshot=None,
            limit=None,
            chat=False,
            max_length=None,
            threads=1,
            seed=0,
        )
    assert error.value.failure == Failure.RUNTIME_UNAVAILABLE
