"""The pick among the variants that meet the target, and what the others lost by."""

from quantline.report.selection import choose
from tests.helpers.report import TARGET, make_row, speed_of


def ranked_by(**changes):
    """Return the target with another `optimize`."""
    return TARGET.model_copy(update={"optimize": TARGET.optimize.model_copy(update=changes)})


def test_choose_takes_the_best_that_meets_the_target():
    rows = [
        make_row("small but bad", 1, 0.3),
        make_row("good", 2, 0.05),
        make_row("better", 3, 0.01),
        make_row("wrong format", 0.5, 0.0, format="safetensors", runtime="transformers"),
    ]
    choice = choose(rows, TARGET)
    assert (choice.pick, choice.runner_up) == ("good", "better")
    assert "smallest size: 2.0 MiB" in choice.reasons[0]
    assert rows[0].objections == ["mean_kld is 0.3, the gate wants <= 0.1"]
    assert "format safetensors" in rows[3].objections[0]


def test_choose_tells_figures_that_hardly_differ_apart_by_the_divergence():
    rows = [
        make_row("least", 2, 0.05),
        make_row("near", 2.009, 0.01),
        make_row("beyond", 2.011, 0.005),
        make_row("far", 3, 0.001),
    ]
    choice = choose(rows, TARGET)
    assert (choice.pick, choice.runner_up) == ("near", "least")
    assert "smallest size to within 0.5%: 2.0 MiB" in choice.reasons[0]
    assert (
        "size is the pick's to within 0.5%, its mean KL divergence 0.05 to the pick's 0.01"
        in rows[0].why_not[0]
    )
    assert "more than the pick" in rows[2].why_not[0]
    assert "more than the pick" in rows[3].why_not[0]
    assert choose(rows, ranked_by(within=0)).pick == "least"
    assert choose([], TARGET).pick is None


def test_choose_says_which_gate_of_the_pick_cannot_tell():
    reasons = choose([make_row("near", 2, 0.095)], TARGET).reasons
    assert any(
        "cannot tell" in reason and "more tokens would decide it" in reason for reason in reasons
    )
    reasons = choose([make_row("far", 2, 0.05)], TARGET).reasons
    assert reasons and not any("cannot tell" in reason for reason in reasons)


def test_choose_picks_nothing_when_nothing_fits():
    target = TARGET.model_copy(update={"max_size_mib": 1.0})
    rows = [make_row("a", 2, 0.01, target)]
    choice = choose(rows, target)
    assert (choice.pick, choice.runner_up) == (None, None)
    assert "no variant meets" in choice.reasons[0]
    assert rows[0].objections == ["2.0 MiB is over the limit of 1 MiB"]


def test_choose_objects_to_a_variant_whose_figure_to_rank_by_was_not_measured():
    target = ranked_by(metric="decode_tok_s")
    assert make_row("a", 2, 0.01, target).objections == []
    assert "ranks, is not measured" in make_row("b", 2, 0.01, target, speed={}).objections[0]


def test_choose_wants_a_recipe_to_meet_the_target_in_several_runtimes():
    target = TARGET.model_copy(update={"min_runtimes": 2})
    onnx = {"format": "onnx", "runtime": "onnxruntime"}
    rows = [
        make_row("alone", 1, 0.01, recipe="a"),
        make_row("gguf-b", 2, 0.01, recipe="b"),
        make_row("onnx-b", 3, 0.01, recipe="b", **onnx),
        make_row("gguf-c", 1, 0.01, recipe="c"),
        make_row("onnx-c", 1, 0.5, recipe="c", **onnx),
    ]
    choice = choose(rows, target)
    assert (choice.pick, choice.runner_up) == ("gguf-b", "onnx-b")
    assert "in llama.cpp alone, which wants 2 runtimes" in rows[0].why_not[0]
    assert "in llama.cpp alone" in rows[3].why_not[0]
    assert "mean_kld is 0.5" in rows[4].why_not[0]


def test_choose_says_of_every_other_variant_why_it_lost():
    rows = [
        make_row("pick", 2, 0.05),
        make_row("larger", 3, 0.01),
        make_row("as large", 2, 0.06),
        make_row("bad", 1, 0.3),
    ]
    choose(rows, TARGET)
    assert [row.why_not for row in rows] == [
        [],
        ["meets the target; size 3.0 MiB, 1.0 MiB (50%) more than the pick"],
        ["meets the target; size is the pick's, its mean KL divergence 0.06 to the pick's 0.05"],
        ["mean_kld is 0.3, the gate wants <= 0.1"],
    ]


def speed(median: float, least: float, greatest: float, *busy: str) -> dict:
    return {
        "speed": speed_of()
        | {"decode_tok_s": median, "decode_spread": [least, greatest], "busy": list(busy)}
    }


def test_choose_does_not_rank_by_speeds_whose_repetitions_overlap():
    target = ranked_by(metric="decode_tok_s", direction="max")
    rows = [
        make_row("fast", 2, 0.05, target, **speed(100, 80, 110)),
        make_row("near", 2, 0.01, target, **speed(85, 84, 86)),
        make_row("slow", 2, 0.001, target, **speed(50, 45, 79)),
    ]
    choice = choose(rows, target)
    assert (choice.pick, choice.runner_up) == ("near", "fast")
    assert "as far as can be told (their repetitions overlap)" in choice.reasons[0]
    assert any("cannot tell fast from it (their repetitions" in one for one in choice.reasons)
    assert "as far as can be told" in rows[[row.variant for row in rows].index("fast")].why_not[0]
    assert "less than the pick" in rows[[row.variant for row in rows].index("slow")].why_not[0]
    rows[0].speed["decode_spread"] = [90, 110]
    assert choose(rows, target).pick == "fast"


def test_choose_does_not_rank_by_what_was_measured_on_a_busy_machine():
    target = ranked_by(metric="decode_tok_s", direction="max")
    rows = [
        make_row("quiet", 2, 0.05, target, **speed(100, 99, 101)),
        make_row("busy", 2, 0.01, target, **speed(50, 49, 51, "the load average was 9")),
    ]
    choice = choose(rows, target)
    assert choice.pick == "busy"
    assert "the machine was busy while busy was measured" in choice.reasons[0]
    rows[0].speed["decode_spread"] = [30, 31]
    rows[0].speed["decode_tok_s"] = 30.5
    choice = choose(rows, target)  # slower than the other was even so
    assert choice.pick == "busy" and "as far" not in choice.reasons[0]
