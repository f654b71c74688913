"""The site builds without a warning."""

import subprocess
import sys

import pytest

from tests.helpers.project import ROOT


@pytest.mark.slow
def test_sphinx_builds_the_site_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = ["sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--doctree-dir", tmp_path / "trees", "docs", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()
    assert "kquant-curvature" in (tmp_path / "recipes.html").read_text()
