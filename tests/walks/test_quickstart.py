"""docs/quickstart.md, typed word for word by somebody new, on the model that it speaks of."""

import re

import pytest

from tests.helpers.docs import blocks
from tests.helpers.project import ROOT
from tests.helpers.walker import LINK, Walker, make_origin

PAGE = "quickstart.md"
RELATIVE = 0.3  # of a divergence: other processors round otherwise


def table_of(text: str) -> dict[str, dict[str, str]]:
    """Return variant → column → cell of the table that is printed at the end."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("variant "))
    titles = ["MiB", "bits/w", "ppl", "KLD", "top %", "gold %", "tok/s", "RAM MiB"]
    assert re.sub(r"\s+", " ", lines[start]).strip() == " ".join(["variant", *titles])
    rows = {}
    for line in lines[start + 1 :]:
        if not line or line.startswith("◆"):
            break
        name, *cells = line.split()
        rows[name] = dict(zip(titles, cells, strict=False))
    return rows


@pytest.mark.slow
@pytest.mark.e2e
def test_the_page_says_what_happens(tmp_path):
    walker = Walker(tmp_path, PAGE)
    printed = walker.types(
        walker.block("make repro"),
        {
            "<this repository>": str(make_origin(tmp_path / "origin")),
            "make repro": f"{LINK} && make repro",
        },
    )
    walker.folder = tmp_path / "quantline"

    texts = [one.code for one in blocks(ROOT / "docs" / PAGE) if one.language == "text"]
    promised = next(code for code in texts if "Ship for" in code)
    told, found = table_of(promised), table_of(printed)
    assert set(found) == set(told) and len(found) == 10
    for name, row in told.items():
        for column in ("MiB", "bits/w", "ppl", "gold %"):
            assert found[name][column] == row[column], (name, column)
        divergence = float(row["KLD"])
        assert float(found[name]["KLD"]) == pytest.approx(divergence, rel=RELATIVE, abs=1e-5)
    (ship,) = re.findall(r"^Ship for .*$", promised, re.MULTILINE)
    assert ship in printed.splitlines()

    assert "Usage" in walker.types(walker.block("quantline --help"))
    picked = walker.types(walker.block("quantline pick"))
    assert "edge" in picked and "gguf-q4_k_m-curvature" in picked

    # What the page says to open, and the folders that it names, are there.
    for name in ("manifest.json", "smoke.json", "README.md"):
        for bundle in (walker.folder / "artifacts/exports").iterdir():
            assert (bundle / name).is_file()
    text = (ROOT / "docs" / PAGE).read_text().partition("## Where things lie")[2]
    places = [
        place
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for place in row.split(", ")
    ]
    assert len(places) == 10
    for place in places:
        path = walker.folder / place.strip("`").replace("<variant>", "gguf-q4_k_m")
        assert path.exists(), place
