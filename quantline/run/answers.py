"""Named failures as JSON, so that they pass from one process to another."""

from typing import Any

from quantline.causes import advice_on, failure_of
from quantline.errors import Failure, Reason, StageError


def failure_answer(error: BaseException) -> dict[str, Any]:
    """Return what says of an error how it is called and what its message is, as JSON."""
    if isinstance(error, StageError):
        return {"failure": error.failure, "message": str(error), "reason": error.reason}
    message = f"{type(error).__name__}: {error}{advice_on(error)}"
    return {"failure": failure_of(error), "message": message}


def result_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Return what a function returned, of what another process wrote.

    Raises:
        StageError: What the function raised.
    """
    if "failure" in answer:
        reason = answer.get("reason")
        raise StageError(
            Failure(answer["failure"]), answer["message"], Reason(reason) if reason else None
        )
    return answer
