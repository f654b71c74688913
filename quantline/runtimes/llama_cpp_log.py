"""What llama.cpp says of its errors, for messages."""

import ctypes
from collections import deque
from functools import cache
from types import ModuleType
from typing import Any

ERROR_LEVEL = 4  # ggml's GGML_LOG_LEVEL_ERROR
CONTINUED_LEVEL = 5  # GGML_LOG_LEVEL_CONT: the line before goes on
QUOTED_LINES = 2  # of llama.cpp's errors: the last is often only that it failed
NO_REASON = "it gave no reason"


class Log:
    """What llama.cpp last said at the level of errors; all else that it says is dropped.

    What goes wrong is seen in return values, and why it did stands in the log alone.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lines: deque[str] = deque(maxlen=20)
        self._level = 0

    def hear(self, level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        """Take a part of the log, as llama_log_set's callback."""
        if level != CONTINUED_LEVEL:
            self._level = level
        if self._level != ERROR_LEVEL:
            return
        said = text.decode(errors="replace")
        if level == CONTINUED_LEVEL and self._lines:
            self._lines[-1] += said
        else:
            self._lines.append(said)

    def clear(self) -> None:
        """Forget what was said."""
        self._lines.clear()

    def reason(self) -> str:
        """Return llama.cpp's own last words, for a message."""
        lines = [line.strip() for line in self._lines if line.strip()]
        return "; ".join(lines[-QUOTED_LINES:]) or NO_REASON


LOG = Log()


@cache
def _log_callback() -> Any:
    """Return LOG as llama.cpp calls it. It is kept, because llama.cpp holds its address."""
    import llama_cpp

    return llama_cpp.llama_log_callback(LOG.hear)


def load_library() -> ModuleType:
    """Import llama_cpp, with its log led to LOG also if another user of it led it elsewhere."""
    import llama_cpp

    llama_cpp.llama_log_set(_log_callback(), ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return llama_cpp
