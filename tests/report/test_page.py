"""The page: one file, safe whatever is on it, with the noise beside each difference."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest

from quantline.config.targets import Gate
from quantline.metrics.lm_eval_tasks import task_metrics
from quantline.model.dequantized import said_of
from quantline.report.markdown import render_markdown
from quantline.report.page import MOST_FLIPS, render_page, serve_parts
from tests.helpers.report import (
    LINEAGE,
    TARGET,
    failed_row,
    make_report,
    make_row,
    speed_of,
    without_gold,
)

HOSTILE = "</details><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"
FLIP = {
    "id": "q7",
    "task": "facts",
    "prompt": "The colour of grass?",
    "reference": "green",
    "said": "blue…",
    "baseline_said": "green!",
    "baseline_correct": True,
    "correct": False,
}


def test_render_page_is_one_file_that_fetches_nothing_and_escapes_what_it_shows():
    def render() -> str:
        smoke = [{"prompt": "<script>alert(1)</script>", "output": "&"}]
        rows = [make_row("a", 2, 0.01, smoke=smoke), failed_row("<img src=x>")]
        return render_page(make_report(rows))

    text = render()
    outside = r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?http"""
    assert not re.search(outside, text)
    assert "<script>alert" not in text
    assert "&lt;img src=x&gt;" in text
    assert "type_substituted" in text
    assert text == render()


def test_render_page_says_how_many_layers_have_which_grid():
    row = make_row("a", 2, 0.01, grids={"groups of 128": 560, "whole rows, symmetric": 1})
    text = render_page(make_report([row, make_row("b", 2, 0.01)]))
    words = "<dt>grids</dt><dd>groups of 128 (560 layers), whole rows, symmetric (1 layer)</dd>"
    assert text.count(words) == text.count("<dt>grids</dt>") == 1


def test_render_page_shows_whatever_comes_from_a_model_or_a_file_as_text():
    flip = FLIP | dict.fromkeys(
        ("id", "task", "prompt", "reference", "said", "baseline_said"), HOSTILE
    )
    lineage = LINEAGE | {
        "serve": HOSTILE,
        "source": {"path": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "created_by": HOSTILE,
        "files": {HOSTILE: {"sha256": HOSTILE, "bytes": 1}},
        "calibration": {"text": HOSTILE},
    }
    layer = {
        "name": HOSTILE,
        "type": HOSTILE,
        "bits": 4,
        "measure": HOSTILE,
        "error": 1.0,
        "plain": HOSTILE,
        "plain_error": 2.0,
    }
    smoke = [{"prompt": HOSTILE, "output": HOSTILE, "checks": {HOSTILE: True}}]
    row = make_row("a", 2, 0.01, flips=[flip], smoke=smoke, layers=[layer], lineage=lineage)
    report = replace(
        make_report([row]),
        model=HOSTILE,
        commit=HOSTILE,
        params={"suite": HOSTILE, "seed": 0},
    )
    text = render_page(report)
    assert "<script>alert" not in text and "<img" not in text
    assert text.count("&lt;script&gt;alert(1)") == 31


def test_render_page_opens_a_flip_to_the_prompt_the_right_answer_and_both_answers():
    text = render_page(make_report([make_row("a", 2, 0.01, flips=[FLIP] * 70)]))
    for shown in (
        "The colour of grass?",
        "<dd>green</dd>",
        "<dd>green!</dd>",
        "<dd>blue…</dd>",
        "lost",
    ):
        assert shown in text
    assert text.count("<code>q7</code>") == MOST_FLIPS
    assert "10 more in metrics/items/a.json" in text


def test_render_page_says_the_noise_beside_each_difference():
    text = re.sub(r"\n\s*", "", render_page(make_report([make_row("a", 2, 0.01)])))
    for shown in (
        "0.01000<small>± 0.00100</small>",
        "3.000<small>+0.100 ± 0.010</small>",
        "90.0<small>~ -1.0, -4.0 to +2.0</small>",
        "97.0<small>± 1.0</small>",
        "<td>0.09<small>± 0.01</small></td><td>0.2</td>",
        "<td>2<small>± 0.1</small></td>",
    ):
        assert shown in text
    assert "~ +0.100" not in text


def test_render_page_without_a_gold_set_has_no_questions():
    row = without_gold(make_row("a", 2, 0.01))
    text = render_page(replace(make_report([row]), tasks=[], baseline={}))
    assert 'id="gold"' not in text
    assert 'id="gold"' in render_page(make_report([make_row("a", 2, 0.01)]))


def test_render_page_appears_when_every_variant_failed():
    report = make_report([failed_row("gone")])
    assert "Nothing meets the target" in render_page(report)
    assert "| broken | failed: type_substituted | | | | | |" in render_markdown(report)


def test_render_page_has_a_column_for_each_metric_of_lm_evaluation_harness():
    results = {
        "results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "versions": {"a": 2.0},
        "n-shot": {"a": 5},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "higher_is_better": {"a": {"acc": True}},
    }
    tasks = task_metrics(results, limit=4, chat=False)
    rows = [make_row("one", 2, 0.01, lm_eval=tasks), make_row("two", 3, 0.02)]
    text = re.sub(r"\n\s*", "", render_page(make_report(rows)))
    assert text.count("acc,none, higher is better") == 1
    assert "0.5 ± 0.1<small>4 documents, 5 shots</small>" in text
    assert 'id="lm-eval"' in text
    assert 'id="lm-eval"' not in render_page(make_report([make_row("three", 4, 0.03)]))


def test_render_page_does_not_repeat_the_picks_gates_among_the_reasons():
    report = make_report([make_row("near", 2, 0.095)])
    (gate,) = report.variants[0].gates
    assert gate["verdict"] == "cannot tell" and gate["said"] in report.reasons
    text = render_page(report).replace("&lt;", "<")
    assert text.count(gate["said"]) == 1


def test_serve_parts_are_words_and_code():
    text = (
        "```\nvllm serve .\n```\n\nIn Python (`pip install x`):\n\n```python\nimport x\n\nx()\n```"
    )
    assert serve_parts(text) == [
        ("", "vllm serve ."),
        ("In Python (`pip install x`):", "import x\n\nx()"),
        ("", ""),
    ]
    assert serve_parts("llama-server") == [("llama-server", "")]
    row = make_row("a", 2, 0.01, lineage=LINEAGE | {"serve": text})
    shown = render_page(make_report([row]))
    assert "<pre>vllm serve .</pre>" in shown and "```" not in shown


def test_render_markdown_is_the_decision_and_the_table():
    rows = [make_row("a", 2, 0.01), without_gold(make_row("b", 3, 0.3)), failed_row("gone")]
    lines = render_markdown(make_report(rows)).splitlines()
    assert lines[0] == "# demo: a (target laptop)"
    heading = (
        "| variant | MiB | bits/weight | bits/weight in layers | KL divergence | perplexity "
        "| gold | tokens/s |"
    )
    assert heading in lines
    assert "|---|---:|---:|---:|---:|---:|---:|---:|" in lines
    assert "| a | 2.0 | 4.50 | 4.25 | 0.01000 ± 0.00100 | 3.000 | 90.0% | 90 |" in lines
    assert "| b | 3.0 | 4.50 | 4.25 | 0.30000 ± 0.03000 | 3.000 | – | 90 |" in lines
    assert "- b: mean_kld is 0.3, the gate wants <= 0.1" in lines


def test_the_page_says_what_dvc_refused():
    report = make_report([make_row("a", 2, 0.01)])
    assert "earlier run" not in render_page(report)
    report.refused = ["DVC did not run load: it's <gone>"]
    assert "DVC did not run load: it&#39;s &lt;gone&gt;" in render_page(report)
    assert "earlier run" in render_page(report)
    assert "- not run this time: DVC did not run load" in render_markdown(report)


def test_the_page_says_that_the_source_is_quantized():
    report = make_report([make_row("a", 2, 0.01)])
    assert "quantized by" not in render_page(report)
    report.dequantized = said_of([{"step": "dequantize", "method": "gptq", "dtype": "float16"}])
    words = "The source is quantized by gptq. What it stands for in float16 is the reference"
    assert words in render_page(report)
    assert words in render_markdown(report)


def test_report_to_json_is_what_other_scripts_read():
    report = make_report([make_row("a", 2, 0.01)])
    values = json.loads(json.dumps(report.to_json()))
    assert values["pick"] == "a" and values["variants"][0]["variant"] == "a"
    assert set(values) == {
        "answers",
        "full_bytes",
        "name",
        "registered",
        "model", "parameters", "target", "pick", "runner_up", "reasons", "tokens", "baseline",
        "tasks", "variants", "commit", "uncommitted", "params", "refused",
        "dequantized", "experts",
    }  # fmt: skip


def test_render_page_says_that_the_commit_alone_does_not_give_the_figures():
    report = make_report([make_row("a", 2, 0.01)])
    assert "That commit alone" not in render_page(report)
    report.uncommitted = ["conf/<x>.yaml", *"abcdef"]
    text = render_page(report)
    assert "7 files were" in text
    assert "conf/&lt;x&gt;.yaml, a, b, c, d, …" in text


def test_render_page_allows_its_own_script_alone():
    text = render_page(make_report([make_row("a", 2, 0.01)]))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "'unsafe-inline'; script" in policy
    assert not re.search(r"<[^>]*\son\w+\s*=", text)  # no handlers in attributes


def test_render_page_shows_control_characters_and_changes_of_direction():
    row = make_row("a", 2, 0.01, flips=[FLIP | {"said": "\x1b[2J\u202egnp.exe\x9b\x00"}])
    text = render_page(make_report([row]))
    assert "\\x1b[2J\\u202egnp.exe\\x9b\\x00" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("reasons", [[], ["the load average was 9"]])
def test_render_page_marks_the_speed_of_a_pick_that_was_measured_on_a_busy_machine(reasons):
    row = make_row("a", 2, 0.01, speed=speed_of() | {"busy": reasons})
    text = render_page(make_report([row]))
    assert ('<small class="open">on a busy machine</small>' in text) == bool(reasons)


def test_render_page_marks_what_was_measured_on_a_busy_machine():
    busy = speed_of() | {"busy": ["other processes used <1> of 2 cores"]}
    target = TARGET.model_copy(
        update={"gates": [Gate(metric="decode_tok_s", operator=">=", threshold=99)]}
    )
    row = make_row("a", 2, 0.01, target, speed=busy)
    report = make_report([row, make_row("b", 3, 0.01, target)], target)
    text = re.sub(r"\n\s*", "", render_page(report))
    assert text.count('<small class="open">busy</small>') == 1
    assert "other processes used &lt;1&gt; of 2 cores. Its speeds are too low" in text
    assert "90, or better: the machine was busy" in text
    lines = render_markdown(report)
    assert "| a (busy) |" in lines and "- a: other processes used <1> of 2 cores" in lines


def test_render_markdown_takes_what_comes_from_others_for_text():
    hostile = "a|b\nc <script>alert(1)</script> ![x](http://y) \x1b[2J & &lt; **d**"
    row = make_row("a", 2, 0.01)
    report = replace(make_report([row, failed_row(hostile)]), model=hostile, reasons=[hostile])
    report.variants[1].failure = hostile
    report.variants[1].why_not = [hostile]
    text = render_markdown(report)
    assert "<script" not in text and "![x](" not in text and "\x1b" not in text
    assert text.count("a\\|b c &lt;script>") == 4
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(columns) == 1 and len(table) == 4
