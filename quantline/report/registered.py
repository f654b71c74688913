"""Which variants are versions of a registered model, as the project's run events say."""

from collections.abc import Iterable
from typing import Any

from quantline.errors import Reason
from quantline.paths import EVENTS
from quantline.report.variant import VariantRow
from quantline.run.events import read_events

SHA256 = "artifact_sha256"
SHOWN = ("name", "version", "alias")


def registered_versions(rows: Iterable[VariantRow]) -> dict[str, dict[str, str]]:
    """Return variant → {name, version, alias} of its newest registration.

    Only of the bytes that are here: a version of another bundle of the same name does not count.
    An alias stays with the variant that had it last.
    """
    newest: dict[Any, dict[str, Any]] = {}  # sha256 → the payload of its newest event
    holders: dict[tuple[str, str], Any] = {}  # model and alias → sha256
    for event in read_events(EVENTS):
        payload = event["payload"]
        if event["reason_code"] != Reason.MODEL_REGISTERED or SHA256 not in payload:
            continue
        newest[payload[SHA256]] = payload
        holders[str(payload.get("name")), str(payload.get("alias"))] = payload[SHA256]
    found = {}
    for row in rows:
        payload = newest.get(row.metrics.get(SHA256), {})
        if not payload:
            continue
        version = {key: str(payload.get(key) or "") for key in SHOWN}
        if holders[version["name"], version["alias"]] != payload[SHA256]:
            version["alias"] = ""
        found[row.variant] = version
    return found
