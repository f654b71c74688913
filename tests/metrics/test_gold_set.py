"""A gold set as it is scored."""

import json

from quantline.metrics.gold_set import GoldResult, TokenizedItem, accuracy, read_tokenized


def test_accuracy_is_per_task_and_over_all():
    results = [
        GoldResult("1", "facts", True, []),
        GoldResult("2", "facts", False, []),
        GoldResult("3", "words", True, []),
    ]
    assert accuracy(results) == {"all": 2 / 3, "facts": 0.5, "words": 1.0}
    assert accuracy([]) == {}


def test_read_tokenized_reads_what_the_reference_stage_wrote(tmp_path):
    item = TokenizedItem("a", "t", "?", "x", "forced", [1], [[2, 3]], 0, [2], stop=["."], end=[0])
    path = tmp_path / "gold.jsonl"
    path.write_text(2 * (json.dumps(item.__dict__) + "\n"))
    assert read_tokenized(path) == [item, item]
