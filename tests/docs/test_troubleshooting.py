"""Every named failure is explained."""

import re

from quantline.errors import Failure
from tests.helpers.project import ROOT

TEXT = (ROOT / "docs/troubleshooting.md").read_text()


def sections() -> dict[str, str]:
    """Return the text of each section with a third-level heading."""
    parts = re.split(r"^### (\w+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_troubleshooting_explains_every_failure_and_no_other():
    assert set(sections()) == set(Failure)


def test_troubleshooting_says_what_each_failure_means_and_what_to_do():
    assert sections()
    for failure, text in sections().items():
        assert "**What it means.**" in text, failure
        assert "**What to do.**" in text, failure
