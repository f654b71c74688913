"""The bytes of artifacts do not change by accident."""

import json

from tests.golden.digests import BLOCK_TYPES, BUNDLES, EXPECTED, digests


def test_containers_and_blocks_have_the_bytes_that_they_had(tmp_path):
    found = digests(tmp_path)
    assert len(found) >= len(BUNDLES) + len(BLOCK_TYPES)
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    assert not changed, "if the change is meant: python -m tests.golden.digests"
