"""The page in a real browser: what its script does. Needs chromium; without it, this is skipped."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import failed, report, row

from stages.report import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--dump-dom")
SCRIPT = """<script>
const told = [], heads = [...document.querySelectorAll(".sortable thead th")];
const tell = () => told.push([
  heads.filter(head => head.ariaSort).map(head => head.textContent + " " + head.ariaSort),
  [...document.querySelectorAll(".sortable tbody th")].map(head => head.firstChild.textContent.trim())]);
tell();
for (const column of [2, 2, 0]) { heads[column].querySelector("button").click(); tell(); }
document.documentElement.dataset.told = JSON.stringify(told);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_heading_sorts_by_value_and_what_failed_stays_last(tmp_path):
    """Sizes of which the text would sort otherwise: 10.0 before 2.0 before 9.0."""
    rows = [row("b", 10, 0.01), row("c", 2, 0.02), row("a", 9, 0.03), failed("gone")]
    path = tmp_path / "page.html"
    path.write_text(page.html(report(rows)).replace("</body>", SCRIPT), encoding="utf-8")
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
                          capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    told = json.loads(found[1].replace("&quot;", '"'))
    assert told == [
        [["KL divergence ascending"], ["b", "c", "a", "broken"]], [["MiB ascending"], ["c", "a", "b", "broken"]],
        [["MiB descending"], ["b", "a", "c", "broken"]], [["variant ascending"], ["a", "b", "c", "broken"]]]
