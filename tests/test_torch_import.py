"""What has to be over before torch has threads is done when it is imported, by whomever."""

import importlib
import importlib.util
import sys

import pytest

from quantline import torch_import
from quantline.torch_import import watch_import

MODULE = "stands_for_torch"
SOURCE = """
calls = []

class Tensor:
    def cos(self):
        calls.append("cos")

def zeros(count):
    calls.append(f"zeros {count}")
    return Tensor()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Let a module of another name stand for torch, and put the finders back."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch_import, "NAME", MODULE)
    finders = [finder for finder in sys.meta_path if finder is not torch_import._AfterImport]
    monkeypatch.setattr(sys, "meta_path", finders)
    yield MODULE
    sys.modules.pop(MODULE, None)


def test_the_first_calls_are_made_when_torch_is_imported(stand_in):
    watch_import()
    watch_import()
    # transformers looks for torch so, long before anything imports it.
    assert importlib.util.find_spec(stand_in) is not None
    assert stand_in not in sys.modules
    torch = importlib.import_module(stand_in)
    assert torch.calls == ["zeros 1", "cos"]
    assert importlib.import_module(stand_in).calls == ["zeros 1", "cos"]


def test_the_first_calls_are_made_at_once_if_torch_is_imported_already(stand_in):
    torch = importlib.import_module(stand_in)
    assert torch.calls == []
    watch_import()
    assert torch.calls == ["zeros 1", "cos"]


def test_a_missing_torch_is_missing_still(stand_in, monkeypatch):
    monkeypatch.setattr(torch_import, "NAME", "no_such_torch")
    watch_import()
    assert importlib.util.find_spec("no_such_torch") is None
    with pytest.raises(ModuleNotFoundError, match="no_such_torch"):
        importlib.import_module("no_such_torch")


def test_quantline_watches():
    assert torch_import._AfterImport in sys.meta_path or "torch" in sys.modules
