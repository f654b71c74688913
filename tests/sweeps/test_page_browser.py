"""A sweep's page in a real browser. Skipped without chromium."""

from collections.abc import Iterator

import pytest

from quantline.sweeps.page import render_page
from tests.helpers.browser import DESKTOP, PHONE, UNFOLD, needs_browser, open_browser
from tests.helpers.sweeps import grid_report

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    yield from open_browser()


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(grid_report(search={"said": ["12 of 40 experiments"]}))


@pytest.mark.parametrize(("scheme", "width"), [("light", DESKTOP), ("dark", PHONE)])
def test_sweep_page_fits_the_screen_and_has_nothing_serious_for_axe(browser, page, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.set_content(page)
    tab.eval_on_selector_all("details", UNFOLD)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    violations = Axe().run(tab).response["violations"]
    serious = [each["id"] for each in violations if each["impact"] in ("serious", "critical")]
    assert serious == [], violations
    assert requests == []  # nothing was fetched


def test_sweep_page_sorts_and_leaves_what_failed_last(browser, page):
    tab = browser.new_page(viewport={"width": DESKTOP, "height": 844})
    tab.set_content(page)
    tab.locator(".sortable th button", has_text="bits").first.click()
    names = "all => all.map(each => each.firstChild.textContent.trim())"
    variants = tab.eval_on_selector_all(".sortable tbody th", names)
    assert variants[-1] == "gptq-bits4-group_size128"
    assert variants[-2] == "gptq-bits4-group_size32"
