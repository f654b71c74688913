"""Gates, the Pareto front, the pick, and the page."""

import json
import re
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantline.model.architecture import from_config
from quantline.config.params import Gate, Target
from quantline.report import gates, page, plots, selection
from quantline.report.memory import kv_cache_bytes, memory
from quantline.report.plots import label_places

ROOT = Path(__file__).resolve().parent.parent
TARGET = Target(name="laptop", formats=["gguf", "onnx"], runtimes=["llama.cpp", "onnxruntime"], max_size_mib=None,
                max_memory_mib=None, gates=[Gate(metric="mean_kld", operator="<=", threshold=0.1)],
                optimize={"metric": "size_bytes", "direction": "min"})


FACTS = from_config({"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
                     "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 384,
                     "max_position_embeddings": 4096, "rms_norm_eps": 1e-6})


LINEAGE = {"source": {"path": "demo", "revision": None}, "recipe": {"name": "r", "method": "rtn"}, "calibration": None,
           "versions": {"gguf": "1.0"}, "files": {"model.gguf": {"sha256": "ab" * 32, "bytes": 4096}}, "created_by": "export-1",
           "serve": "llama-server --model model.gguf"}


def row(name: str, size: float, kld: float, target: Target = TARGET, **more) -> dict:
    """A measured variant of `size` MiB."""
    metrics = {"size_bytes": size * 2**20, "mean_kld": kld, "mean_kld_se": kld / 10, "p999_kld": 9 * kld,
               "p999_kld_se": kld, "max_kld": 20 * kld, "rms_delta_p": 0.02, "rms_delta_p_se": 0.001, "perplexity": 3.0, "tokens": 100,
               "perplexity_delta": 0.1, "perplexity_delta_se": 0.01, "bits_per_weight": 4.5, "same_top_p": 0.97,
               "same_top_p_se": 0.01, "gold_accuracy_delta_interval": [-0.04, 0.02],
               "gold_tasks": {"facts": {"accuracy": 0.9, "lost": 2, "won": 1, "items": 100}}, "gold_accuracy": 0.9,
               "gold_accuracy_delta": -0.01, "gold_flips": 3, "gold_lost": 2, "gold_won": 1,
               "gold_p_value": 0.6, "gold_items": 100, "gold_facts": 0.9, "artifact_sha256": "ab" * 32,
               "runtime_version": "1.0"}
    speed = {"load_s": 0.1, "prefill_tok_s": 900.0, "decode_tok_s": 90.0, "peak_rss_mib": 300.0, "threads": 2,
             "device": "cpu"}
    made = {"variant": name, "recipe": "r", "format": "gguf", "runtime": "llama.cpp", "status": "ok", "failure": None,
            "message": None, "pareto": False, "metrics": metrics, "speed": speed, "flips": [], "smoke": [], "estimated": {},
            "layers": [], "lineage": LINEAGE, "substituted_share": 0.0} | more
    made["gates"] = [gates.check_gate(gate, made["metrics"]) for gate in target.gates]
    made["memory"] = memory(made, target, FACTS)
    made["objections"] = selection.objections(made, target)
    return made


def test_the_front_holds_what_no_other_beats_in_both():
    rows = [row("small", 1, 0.3), row("mid", 2, 0.1), row("beaten", 3, 0.1), row("big", 4, 0.0)]
    assert selection.on_front(rows) == {"small", "mid", "big"}


def test_the_pick_is_the_best_among_those_that_meet_the_target():
    rows = [row("small but bad", 1, 0.3), row("good", 2, 0.05), row("better", 3, 0.01),
            row("wrong format", 0.5, 0.0, format="safetensors", runtime="transformers")]
    chosen, second, reasons = selection.pick(rows, TARGET)
    assert (chosen, second) == ("good", "better")
    assert "smallest size: 2.0 MiB" in reasons[0]
    assert rows[0]["objections"] == ["mean_kld is 0.3, the gate wants <= 0.1"]
    assert "format safetensors" in rows[3]["objections"][0]


def test_figures_that_hardly_differ_are_told_apart_by_the_divergence():
    rows = [row("least", 2, 0.05), row("near", 2.009, 0.01), row("beyond", 2.011, 0.005), row("far", 3, 0.001)]
    chosen, second, reasons = selection.pick(rows, TARGET)
    assert (chosen, second) == ("near", "least") and "smallest size to within 0.5%: 2.0 MiB" in reasons[0]
    assert "size is the pick's to within 0.5%, its mean KL divergence 0.05 to the pick's 0.01" in rows[0]["why_not"][0]
    assert "more than the pick" in rows[2]["why_not"][0] and "more than the pick" in rows[3]["why_not"][0]
    exact = TARGET.model_copy(update={"optimize": TARGET.optimize.model_copy(update={"within": 0})})
    assert selection.pick(rows, exact)[0] == "least" and selection.pick([], TARGET)[0] is None


def test_a_gate_of_the_pick_that_cannot_tell_is_said_in_its_reasons():
    _, _, reasons = selection.pick([row("near", 2, 0.095)], TARGET)
    assert any("cannot tell" in reason and "more tokens would settle it" in reason for reason in reasons)
    assert not any("cannot tell" in reason for reason in selection.pick([row("far", 2, 0.05)], TARGET)[2])


def test_nothing_is_picked_when_nothing_fits():
    target = TARGET.model_copy(update={"max_size_mib": 1.0})
    rows = [row("a", 2, 0.01, target)]
    chosen, second, reasons = selection.pick(rows, target)
    assert (chosen, second) == (None, None)
    assert "no variant meets" in reasons[0]
    assert rows[0]["objections"] == ["2.0 MiB is over the limit of 1 MiB"]


def test_memory_that_was_not_measured_does_not_pass_a_limit():
    target = TARGET.model_copy(update={"max_memory_mib": 1000.0})
    assert row("a", 2, 0.01, target)["objections"] == []
    assert "not known" in row("b", 2, 0.01, target, speed={})["objections"][0]


def test_memory_includes_the_kv_cache_at_the_context():
    assert kv_cache_bytes(FACTS, 4096, 2) == 2 * 6 * 2 * 32 * 2 * 4096  # 6 MiB
    target = TARGET.model_copy(update={"max_memory_mib": 305.0, "context": 4096})
    assert row("gguf", 2, 0.01, target)["objections"] == [(
        "memory is 306 MiB, over the limit of 305 MiB (300.0 MiB measured peak + 2 × 6 layers × 2 KV heads × 32 wide × "
        "2 bytes × 4096 tokens = 300.0 + 6.0 MiB)")]
    onnx = row("onnx", 2, 0.01, target.model_copy(update={"memory": "size"}), format="onnx", runtime="onnxruntime")
    assert onnx["memory"]["mib"] == 2 + 12 and onnx["memory"]["provenance"] == "estimated"  # its cache is in float32
    assert memory(onnx, target, None)["mib"] is None
    without = memory(onnx, TARGET, FACTS)
    assert (without["mib"], without["provenance"]) == (300, "measured")


def test_a_figure_to_rank_by_that_was_not_measured_is_an_objection():
    target = TARGET.model_copy(update={"optimize": TARGET.optimize.model_copy(update={"metric": "decode_tok_s"})})
    assert row("a", 2, 0.01, target)["objections"] == []
    assert "ranks, is not measured" in row("b", 2, 0.01, target, speed={})["objections"][0]


def test_a_recipe_has_to_meet_the_target_in_as_many_runtimes_as_it_wants():
    target = TARGET.model_copy(update={"min_runtimes": 2})
    onnx = {"format": "onnx", "runtime": "onnxruntime"}
    rows = [row("alone", 1, 0.01, recipe="a"), row("gguf-b", 2, 0.01, recipe="b"), row("onnx-b", 3, 0.01, recipe="b", **onnx),
            row("gguf-c", 1, 0.01, recipe="c"), row("onnx-c", 1, 0.5, recipe="c", **onnx)]
    assert selection.pick(rows, target)[:2] == ("gguf-b", "onnx-b")
    assert "in llama.cpp alone, which wants 2 runtimes" in rows[0]["why_not"][0]
    assert "in llama.cpp alone" in rows[3]["why_not"][0] and "mean_kld is 0.5" in rows[4]["why_not"][0]


def test_every_other_variant_is_told_why_it_lost():
    rows = [row("pick", 2, 0.05), row("larger", 3, 0.01), row("as large", 2, 0.06), row("bad", 1, 0.3)]
    selection.pick(rows, TARGET)
    assert [one["why_not"] for one in rows] == [
        [], ["meets the target; size 3.0 MiB, 1.0 MiB (50%) more than the pick"],
        ["meets the target; size is the pick's, its mean KL divergence 0.06 to the pick's 0.05"],
        ["mean_kld is 0.3, the gate wants <= 0.1"]]


def report(rows: list[dict]) -> dict:
    chosen, second, reasons = selection.pick(rows, TARGET)
    return {"model": "demo", "parameters": 5e6, "target": TARGET.model_dump(), "pick": chosen, "runner_up": second,
            "reasons": reasons, "tokens": 1000, "baseline": {"all": 0.9, "facts": 0.9}, "tasks": ["facts"],
            "variants": rows, "commit": "c" * 40, "params": {"suite": "quick", "seed": 0}}


def failed(message: str) -> dict:
    return row("broken", 1, 1) | {"status": "failed", "failure": "type_substituted", "message": message, "metrics": {},
                                  "speed": {}, "gates": [], "memory": {"mib": None}}


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_what_it_shows():
    smoke = [{"prompt": "<script>alert(1)</script>", "output": "&"}]
    text = page.html(report([row("a", 2, 0.01, smoke=smoke), failed("<img src=x>")]))
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?http""", text)
    assert "<script>alert" not in text
    assert "&lt;img src=x&gt;" in text
    assert "type_substituted" in text
    assert text == page.html(report([row("a", 2, 0.01, smoke=smoke), failed("<img src=x>")]))


HOSTILE = "</details><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"


def test_whatever_comes_from_a_model_or_a_file_is_text_on_the_page():
    flip = {"id": HOSTILE, "task": HOSTILE, "prompt": HOSTILE, "reference": HOSTILE, "said": HOSTILE,
            "baseline_said": HOSTILE, "baseline_correct": True, "correct": False}
    lineage = LINEAGE | {"serve": HOSTILE, "source": {"path": HOSTILE}, "versions": {HOSTILE: HOSTILE}, "created_by": HOSTILE,
                         "files": {HOSTILE: {"sha256": HOSTILE, "bytes": 1}}, "calibration": {"text": HOSTILE}}
    layers = [{"name": HOSTILE, "type": HOSTILE, "bits": 4, "measure": HOSTILE, "error": 1.0, "plain": HOSTILE,
               "plain_error": 2.0}]
    smoke = [{"prompt": HOSTILE, "output": HOSTILE, "checks": {HOSTILE: True}}]
    made = report([row("a", 2, 0.01, flips=[flip], smoke=smoke, layers=layers, lineage=lineage)])
    made |= {"model": HOSTILE, "commit": HOSTILE, "params": {"suite": HOSTILE, "seed": 0}}
    text = page.html(made)
    assert "<script>alert" not in text and "<img" not in text
    assert text.count("&lt;script&gt;alert(1)") == 29


def test_a_flip_opens_to_the_prompt_the_right_answer_and_both_answers():
    flip = {"id": "q7", "task": "facts", "prompt": "The colour of grass?", "reference": "green", "said": "blue…",
            "baseline_said": "green!", "baseline_correct": True, "correct": False}
    text = page.html(report([row("a", 2, 0.01, flips=[flip] * 70)]))
    for told in ("The colour of grass?", "<dd>green</dd>", "<dd>green!</dd>", "<dd>blue…</dd>", "lost"):
        assert told in text
    assert text.count("<code>q7</code>") == page.MOST_FLIPS and "10 more in metrics/items/a.json" in text


def test_the_table_says_the_noise_beside_each_difference():
    text = page.html(report([row("a", 2, 0.01)]))
    for told in ("0.01000<small>± 0.00100</small>", "3.000<small>+0.100 ± 0.010</small>",
                 "90.0<small>~ -1.0, -4.0 to +2.0</small>", "97.0<small>± 1.0</small>", "<td>0.09<small>± 0.01</small></td><td>0.2</td>", "<td>2<small>± 0.1</small></td>"):
        assert told in text
    assert "~ +0.100" not in text


def test_without_a_gold_set_there_is_one_plot_and_no_questions():
    some = row("a", 2, 0.01)
    some["metrics"] = {key: value for key, value in some["metrics"].items() if not key.startswith("gold_")}
    text = page.html(report([some]) | {"tasks": [], "baseline": {}})
    assert text.count("<svg") == 1 and 'id="gold"' not in text
    assert page.html(report([row("a", 2, 0.01)])).count("<svg") == 2


def test_the_two_plots_share_no_id():
    ids = re.findall(r'\bid="([^"]+)"', page.html(report([row("a", 2, 0.01), row("b", 3, 0.001)])))
    assert len(ids) == len(set(ids)) > 20


def test_the_front_of_a_plot():
    assert plots.front([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1)]) == [(1, 5), (2, 3), (4, 1)]


def test_the_lines_that_serve_a_bundle_are_words_and_code():
    text = "```\nvllm serve .\n```\n\nIn Python (`pip install x`):\n\n```python\nimport x\n\nx()\n```"
    assert page.serve_parts(text) == [("", "vllm serve ."), ("In Python (`pip install x`):", "import x\n\nx()"), ("", "")]
    assert page.serve_parts("llama-server") == [("llama-server", "")]
    shown = page.html(report([row("a", 2, 0.01, lineage=LINEAGE | {"serve": text})]))
    assert "<pre>vllm serve .</pre>" in shown and "```" not in shown


def test_dvc_plots_get_the_points_and_the_fronts_of_both_plots():
    rows = [row("a", 2, 0.3), row("b", 3, 0.1), row("c", 4, 0.2)]
    rows[2]["metrics"] = {**rows[2]["metrics"], "gold_accuracy": 0.95}
    rows[0]["metrics"] = {key: value for key, value in rows[0]["metrics"].items() if not key.startswith("gold_")}
    told = plots.data(rows)
    assert [one["mean_kld_front"] for one in told] == [True, True, False]
    assert [one.get("gold_accuracy_front") for one in told] == [None, True, True]
    assert told[0] == {"variant": "a", "format": "gguf", "size_mib": 2.0, "mean_kld": 0.3, "gold_accuracy": None,
                       "mean_kld_front": True}


def test_the_templates_of_dvc_plots_ask_for_what_there_is():
    fields = {*plots.data([row("a", 2, 0.3)])[0], "shown", "rev"}
    for name, metric in (("pareto_log", "mean_kld"), ("pareto", "gold_accuracy")):
        text = (ROOT / f".dvc/plots/{name}.json").read_text()
        assert json.loads(text)["data"] == {"values": "<DVC_METRIC_DATA>"}
        text = text.replace("<DVC_METRIC_Y>", metric).replace("<DVC_METRIC_X>", "size_mib")
        assert {*re.findall(r"datum\['(\w+)'\]", text), *re.findall(r'"field": "(\w+)"', text)} <= fields


def test_the_page_appears_when_every_variant_failed():
    text = page.html(report([failed("gone")]))
    assert "Nothing meets the target" in text
    assert "failed: type_substituted" in page.markdown(report([failed("gone")]))


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), min_size=1, max_size=12))
def test_labels_of_the_plot_do_not_cover_each_other(points):
    places = label_places(np.array(points), ["gguf-q4_k_m"] * len(points))
    for (x, y), (px, py) in zip(points, places, strict=True):
        assert px > x and py >= y
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[:index]:
            assert abs(y - other_y) >= 10.9 or abs(x - other_x) >= 57
