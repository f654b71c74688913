"""Pre-tokenizers are told apart by their steps."""

import pytest

from quantline.formats.gguf.pretokenizers import PRE_TOKENIZERS, find_pre_tokenizers

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (BYTE_LEVEL, [("gpt-2", False)]),
        (BYTE_LEVEL | {"add_prefix_space": True}, []),
        ({"type": "Whitespace"}, []),
        (None, []),
    ],
)
def test_find_pre_tokenizers_knows_gpt2s_and_nothing_like_the_others(spec, names):
    assert list(find_pre_tokenizers(spec)) == names


def test_find_pre_tokenizers_takes_gpt2s_expression_in_either_way_of_writing():
    (_, (kind, regex)), *_ = [("", step) for step in next(iter(PRE_TOKENIZERS))]
    assert kind == "split"
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    steps = [split, BYTE_LEVEL | {"use_regex": False}]
    spec = {"type": "Sequence", "pretokenizers": steps}
    assert find_pre_tokenizers(spec) == find_pre_tokenizers(BYTE_LEVEL)
