"""Importance matrices in llama-imatrix's format."""

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.gguf.imatrix import (
    Entry,
    ImportanceMatrix,
    read_importance,
    write_importance,
)

SUMS = np.array([[2.0, 4.0, 8.0], [1.0, 1.0, 1.0]], np.float32)
COUNTS = np.array([2.0, 0.0], np.float32)


def test_entry_values_are_means_and_one_where_no_token_came():
    assert Entry(SUMS, COUNTS).values().tolist() == [[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]]


def test_read_importance_returns_what_write_importance_wrote(tmp_path):
    entries = {
        "blk.0.ffn_up_exps.weight": Entry(SUMS, COUNTS),
        "blk.0.attn_q.weight": Entry(SUMS[:1], COUNTS[:1]),
    }
    matrix = ImportanceMatrix(entries, ("a.txt", "b.txt"), chunks=3, chunk_size=64)
    write_importance(tmp_path / "imatrix.gguf", matrix, "llama")
    found = read_importance(tmp_path / "imatrix.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt", "b.txt"), 3, 64)
    assert sorted(found.entries) == sorted(entries)
    for name, entry in entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert np.array_equal(found.entries[name].counts, entry.counts)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry(SUMS, COUNTS[:1]), "as many counts as matrices of x, found 1 and 2"),
        (Entry(SUMS, COUNTS * 0), "tokens that x was given, found none"),
        (Entry(SUMS * np.nan, COUNTS), "not negative in x.in_sum2, found NaN"),
        (Entry(-SUMS, COUNTS), "not negative in x.in_sum2"),
    ],
)
def test_read_importance_refuses_numbers_that_make_no_sense(entry, words, tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_importance(path, ImportanceMatrix({"x": entry}, ("text",), 1, 1), "llama")
    with pytest.raises(StageError, match=words) as caught:
        read_importance(path)
    assert caught.value.failure == Failure.IMPORTANCE_INVALID


def test_read_importance_names_a_file_that_is_missing_or_none(tmp_path):
    with pytest.raises(StageError, match="found no such file") as caught:
        read_importance(tmp_path / "none.gguf")
    assert caught.value.failure == Failure.MISSING_FILE
    (tmp_path / "text.gguf").write_text("GGUF")
    with pytest.raises(StageError, match="cannot be read") as caught:
        read_importance(tmp_path / "text.gguf")
    assert caught.value.failure == Failure.IMPORTANCE_INVALID
    # gguf writes no empty list.
    matrix = ImportanceMatrix({"x": Entry(SUMS, COUNTS)}, (), 1, 1)
    write_importance(tmp_path / "no-text.gguf", matrix, "llama")
    with pytest.raises(StageError, match=r"found 'imatrix' without imatrix\.datasets") as caught:
        read_importance(tmp_path / "no-text.gguf")
    assert caught.value.failure == Failure.IMPORTANCE_INVALID
