"""The page of all models, and the short tables, are what was found out."""

import pytest

from benchmarks.models.page import PAGE, WITH_COUNTS, page, with_counts
from benchmarks.models.results import first_sentence, read_results, write_results

RECORDS = [
    {
        "name": "one",
        "made": {"class_name": "OneForCausalLM", "kind": "dense", "parameters": 10},
        "tried": ["bf16"],
        "steps": {"make": {"failure": None}, "load": {"failure": None}},
        "figures": {"calibrate": {"layers": 3}, "bf16": {"mean_kld": 1e-9, "difference": 2e-6}},
    },
    {
        "name": "two",
        "made": {"class_name": "TwoForCausalLM", "kind": "mixture", "parameters": 10},
        "tried": ["bf16", "onnx-fp32"],
        "steps": {
            "make": {"failure": None},
            "export onnx-fp32": {
                "failure": "unsupported_architecture",
                "message": "expected what ONNX has, found `twist` in /tmp/x/y; take another format",
            },
        },
        "figures": {"calibrate": {"layers": 2}, "bf16": {"mean_kld": 0.5}},
    },
    {
        "name": "three",
        "steps": {"make": {"failure": "not_made", "message": "NotTinyError: it needs an image"}},
        "figures": {},
    },
]


def test_page_shows_figures_refusals_and_what_is_not_tried(tmp_path):
    names = ("one", "two", "three", "four")
    text = page(write_results(RECORDS, names, tmp_path / "models.json"))
    assert "| `one` | OneForCausalLM | dense | yes | 1e-09 (2e-06) | – |" in text
    assert "| full precision in safetensors | 1 of 1 | 0 of 1 | 0 of 0 | 0 of 0 | 1 of 2 |" in text
    assert "| ONNX, full precision | 0 of 0 | 0 of 1 | 0 of 0 | 0 of 0 | 0 of 1 |" in text
    assert "waits for the next `make models`\n\n`four`\n" in text
    assert "* `two`: `unsupported_architecture`: expected what ONNX has, found \\`twist\\`" in text
    assert "* three: NotTinyError: it needs an image" in text
    assert "/tmp/x" not in text


@pytest.mark.parametrize("path", [PAGE, *WITH_COUNTS], ids=lambda path: path.name)
def test_pages_are_generated_from_the_results(path):
    results = read_results()
    expected = page(results) if path == PAGE else with_counts(path, results)
    assert path.read_text(encoding="utf-8") == expected, "run python -m benchmarks.models --page"


def test_first_sentence_leaves_out_advice_and_paths():
    message = "expected a file, found none at /tmp/a/b.txt; correct the path"
    assert first_sentence(message) == "expected a file, found none at …"
