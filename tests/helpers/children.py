"""Child processes that are forked from the tests', and so have everything imported already.

What a stage computes in a fresh interpreter (quantline/run/child_process.py) takes seconds, nearly
all of which go into imports. Where a test is not about the process, a fork gives the same answer.
"""

from typing import Any

from benchmarks.models.forks import CALLERS, call_in_fork


def fork_children(patch: Any) -> None:
    """Let the stages call functions in forks until a MonkeyPatch is undone."""
    for module in CALLERS:
        patch.setattr(f"{module}.call_in_child", call_in_fork)
