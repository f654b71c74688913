"""What has to happen in a process between the import of torch and its first computation.

MKL asks the processor what it is on the first call of one of its vector functions, and two threads
that make that call at once can see an answer that is not final yet. One of them then computes with
a kernel of 11 bits, such as the cosines of half of the positions (mkl_vml_serv_cpu_detect, MKL up
to 2024.2 at least). So that call is made here, where there is one thread.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

NAME = "torch"


def make_first_calls(torch: ModuleType) -> None:
    """Make the calls that have to be over before there are threads."""
    torch.zeros(1).cos()


class _AfterImport:
    """Finds torch as the other finders do, and makes the first calls when it is imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of torch, and None for every other module."""
        if name != NAME:
            return None
        for finder in sys.meta_path:
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _add_first_calls(spec)
                return spec
        return None


def _add_first_calls(spec: importlib.machinery.ModuleSpec) -> None:
    """Let the spec's loader make the first calls when it has run the module."""
    loader = spec.loader
    if loader is None:  # a folder of that name, without code
        return
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        make_first_calls(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def watch_import() -> None:
    """Make the first calls as soon as torch is imported, or now if it is already."""
    torch = sys.modules.get(NAME)
    if torch is not None and hasattr(torch, "zeros"):
        make_first_calls(torch)
    elif _AfterImport not in sys.meta_path:
        sys.meta_path.insert(0, _AfterImport)
