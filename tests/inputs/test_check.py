"""What the user supplies, checked before anything runs: all problems in one list."""

import json
import shutil
from pathlib import Path

import pytest

from quantline.config.compose import load_params
from quantline.errors import Failure, StageError
from quantline.inputs.check import Findings, InputCheck, check_inputs
from tests.helpers.models import sentences
from tests.helpers.tensor_files import edit_json


@pytest.fixture(scope="module")
def gpt2(make_model, tmp_path_factory) -> Path:
    """GPT-2 with 64 learned positions."""
    folder = make_model(
        tmp_path_factory.mktemp("gpt2") / "model",
        "gpt2",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
    )
    edit_json(folder / "config.json", n_positions=64)
    return folder


def findings_of(project, *overrides: str) -> Findings:
    project.compose(*overrides)
    return InputCheck(load_params()).run()


def messages(findings: Findings) -> list[str]:
    return [f"{problem.failure}: {problem}" for problem in findings.problems]


def test_check_inputs_takes_what_is_right(project):
    project.compose()
    warnings: list[str] = []
    findings = check_inputs(load_params(), warnings.append)
    assert findings == Findings()
    assert warnings == []


def test_check_inputs_lists_all_problems_at_once(project, texts, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"caf\xe9")
    lines = (texts / "gold.jsonl").read_text().splitlines()
    (tmp_path / "gold.jsonl").write_text("\n".join([*lines, "{", '{"id": "x"}']))
    project.compose(
        f"calibration.path={tmp_path / 'text.txt'}",
        f"evaluation.gold={tmp_path / 'gold.jsonl'}",
        "evaluation.length=100000",
        f"model.adapter={tmp_path / 'no-adapter'}",
        "+recipes.q4_k_m.overrides={blk_99: Q8_0}",
        'evaluation.smoke_prompts=["", one]',
    )
    with pytest.raises(StageError) as caught:
        check_inputs(load_params(), print)
    message = str(caught.value)
    assert caught.value.failure == Failure.CONFIG_INVALID
    for words in (
        "found 6 problems",
        "missing_file: model.adapter: expected the folder of an adapter",
        "dataset_invalid: calibration: expected a file of text in UTF-8",
        "calibration_empty: evaluation: expected at least 100000 tokens",
        "dataset_invalid: evaluation.gold: expected one JSON object",
        "config_invalid: expected evaluation.smoke_prompts that the tokenizer makes tokens of",
        "config_invalid: recipes.q4_k_m: expected the override 'blk_99'",
    ):
        assert words in message


def test_check_inputs_of_one_problem_raises_it_as_it_is(project, tmp_path):
    project.compose(f"model.path={tmp_path / 'gone'}")
    with pytest.raises(StageError, match=r"found no folder; check model\.path") as caught:
        check_inputs(load_params(), print)
    assert caught.value.failure == Failure.MISSING_FILE


def test_check_refuses_a_checkpoint_by_the_name_that_load_has_for_it(project, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (found,) = messages(findings_of(project, f"model.path={model}"))
    assert found.startswith("unsafe_checkpoint: ")
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (found,) = messages(findings_of(project, f"model.path={model}"))
    assert found.startswith("custom_code: ")


def test_check_names_lengths_beyond_learned_positions(project, gpt2, texts, tmp_path):
    lines = (texts / "gold.jsonl").read_text().splitlines()
    long = {"id": "long", "prompt": " ".join(sentences(9, 2)), "answer": " ada"}
    talkative = {"id": "much", "prompt": "who?", "answer": "ada", "max_tokens": 100}
    (tmp_path / "gold.jsonl").write_text(
        "\n".join([*lines[:1], *map(json.dumps, (long, talkative))])
    )
    findings = findings_of(
        project,
        f"model.path={gpt2}",
        "calibration.length=65",
        "evaluation.length=128",
        "evaluation.speed.prompt_tokens=128",
        "evaluation.speed.new_tokens=64",
        f"evaluation.gold={tmp_path / 'gold.jsonl'}",
    )
    found = messages(findings)
    assert len(found) == 4
    assert "config_invalid: calibration.length: expected 64 tokens at most" in found[0]
    assert "config_invalid: evaluation.length: expected 64 tokens at most" in found[1]
    assert "evaluation.speed.prompt_tokens=128 and evaluation.speed.new_tokens=64" in found[2]
    assert "dataset_invalid: evaluation.gold: expected gold items of 64 tokens" in found[3]
    assert "item 'long' (line 2)" in found[3] and "item 'much' (line 3)" in found[3]
    allowed = ("calibration.length=64", "evaluation.length=64", "evaluation.speed.new_tokens=63")
    assert messages(findings_of(project, f"model.path={gpt2}", *allowed)) == []


def test_check_says_where_a_model_that_rotates_goes_beyond_its_positions(project):
    findings = findings_of(project, "calibration.length=300", "evaluation.speed.new_tokens=300")
    assert messages(findings) == []
    first, second = findings.warnings
    assert "calibration.length: 300 tokens are more than the 256 positions" in first
    assert "evaluation.speed.new_tokens: 300" in second


def test_check_says_which_recipes_do_not_fit_the_widths(project, tiny_narrow):
    findings = findings_of(
        project, f"model.path={tiny_narrow}", "recipes.gptq-w4g128.group_size=128"
    )
    assert messages(findings) == []
    warning = next(text for text in findings.warnings if "gptq-w4g128" in text)
    assert warning.startswith("recipes.gptq-w4g128 is going to fail, and the others go on")
    assert "rows of 64, 176 weights" in warning
    assert "set recipes.gptq-w4g128.group_size=auto, or -1 for all layers" in warning


def test_check_finds_nothing_to_say_of_groups_that_are_chosen_by_layer(project, tiny_narrow):
    findings = findings_of(project, f"model.path={tiny_narrow}")
    assert not any("group" in text for text in findings.warnings)


def test_check_names_messages_that_the_template_refuses(project, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    chat = [{"role": "user", "content": "who?"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    gold = {"id": "a", "messages": chat, "answer": " ada"}
    (tmp_path / "gold.jsonl").write_text(json.dumps(gold))
    found = messages(
        findings_of(
            project,
            f"model.path={model}",
            f"evaluation.path={tmp_path / 'chat.jsonl'}",
            f"evaluation.gold={tmp_path / 'gold.jsonl'}",
        )
    )
    assert len(found) == 2
    assert found[0].startswith("dataset_invalid: evaluation: ")
    assert found[1].startswith("dataset_invalid: evaluation.gold: ")
    assert all("roles must alternate" in message for message in found)


def test_check_names_texts_that_overlap(project, texts):
    (found,) = messages(findings_of(project, f"evaluation.path={texts / 'calibration.txt'}"))
    assert found.startswith("texts_overlap: ")
    path = f"evaluation.path={texts / 'calibration.txt'}"
    assert messages(findings_of(project, path, "evaluation.allow_overlap=true")) == []


def test_check_stage_writes_what_load_depends_on_unless_there_is_a_problem(project, capsys):
    project.stage("check")
    assert (project.root / "artifacts/checked.json").is_file()
    (project.root / "artifacts/checked.json").unlink()
    project.compose("calibration.length=300", "calibration.path=gone.txt")
    with pytest.raises(SystemExit):
        project.stage("check")
    assert not (project.root / "artifacts/checked.json").exists()
    assert "dataset_invalid" in capsys.readouterr().err
    project.compose("calibration.length=300")
    project.stage("check")
    warnings = [event for event in project.events() if event["severity"] == "warning"]
    assert "calibration.length: 300 tokens" in warnings[-1]["summary"]


def test_check_inputs_warns_of_json_lines_in_plain_text(project, tmp_path):
    lines = [json.dumps({"text": text}) for text in sentences(1, 40)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    findings = findings_of(project, f"calibration.path={tmp_path / 'text.txt'}")
    assert not findings.problems
    assert "calibration: " in findings.warnings[0]
    assert "text.jsonl" in findings.warnings[0]
