"""The command line of the stage lm_eval."""

import pytest

from quantline.metrics.lm_eval_options import parse_arguments


def test_parse_arguments_has_a_default_for_all_but_the_variant_and_the_tasks():
    options = vars(parse_arguments(["gguf-q4_k_m", "--tasks", "arc_easy,hellaswag"]))
    assert options == {
        "variant": "gguf-q4_k_m",
        "tasks": "arc_easy,hellaswag",
        "include_path": None,
        "fewshot": None,
        "limit": None,
        "chat": False,
        "max_length": None,
    }


def test_parse_arguments_reads_every_option():
    line = "bf16 --tasks mine --include-path tasks --fewshot 5 --limit 10 --chat --max-length 512"
    options = vars(parse_arguments(line.split()))
    assert options == {
        "variant": "bf16",
        "tasks": "mine",
        "include_path": "tasks",
        "fewshot": 5,
        "limit": 10,
        "chat": True,
        "max_length": 512,
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bf16", "required: --tasks"),
        ("--tasks mine", "required: variant"),
        ("bf16 --tasks mine --limit many", "--limit: invalid int value: 'many'"),
        ("bf16 --tasks mine --shots 5", "unrecognized arguments: --shots 5"),
    ],
)
def test_parse_arguments_refuses_what_it_does_not_know(line, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(line.split())
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
