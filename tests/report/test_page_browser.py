"""The page in a real browser: sorting, keyboard, accessibility. Skipped without chromium."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from quantline.config.targets import Hardware
from quantline.report.build import Report
from quantline.report.page import render_page
from tests.helpers.browser import DESKTOP, PHONE, UNFOLD, needs_browser, open_browser
from tests.helpers.report import TARGET, failed_row, make_report, make_row

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    yield from open_browser()


def complete_report() -> Report:
    """Return a report with every part of the page.

    Plots, flips, layers, smoke traces, estimates, gates of every verdict, and a failure.
    """
    flip = {
        "id": "q7",
        "task": "facts",
        "prompt": "The colour of grass?",
        "reference": "green",
        "said": "blue",
        "baseline_said": "green",
        "baseline_correct": True,
        "correct": False,
    }
    layer = {
        "name": "model.layers.0.mlp.down_proj",
        "type": "Q4_K",
        "bits": 4.5,
        "measure": "tr(ΔW H ΔWᵀ)",
        "error": 0.2,
        "plain": "round-to-nearest",
        "plain_error": 0.4,
    }
    smoke = {
        "prompt": "One day",
        "output": " a fox",
        "checks": {"finite": True, "repeatable": False},
    }
    estimated = {
        "decode_tok_s": 50.0,
        "hardware": "small board",
        "provenance": "estimated",
        "formula": "16 ÷ 2",
    }
    parts = {"flips": [flip], "layers": [layer], "smoke": [smoke], "estimated": estimated}
    rows = [
        make_row("gguf-q4_k_m-curvature", 10, 0.01, pareto=True, **parts),
        make_row("onnx-int8", 2, 0.095, format="onnx", runtime="onnxruntime", **parts),
        make_row("awq-w4g128", 9, 0.3, format="safetensors", **parts),
        failed_row("gone"),
    ]
    hardware = Hardware(name="small board", bandwidth_gb_s=16)
    target = TARGET.model_copy(update={"hardware": hardware, "context": 4096})
    return replace(make_report(rows), target=target.model_dump())


def open_page(browser, report: Report, width: int = DESKTOP, scheme: str = "light"):
    """Return the page at that width, and what it asked the network for."""
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.set_content(render_page(report))
    return tab, requests


def order(tab) -> tuple[list[str], list[str]]:
    """Return the headings that say how their column is sorted, and the variants from the top."""
    headings = tab.eval_on_selector_all(
        ".sortable th[aria-sort]", "all => all.map(e => e.innerText.trim() + ' ' + e.ariaSort)"
    )
    variants = tab.eval_on_selector_all(
        ".sortable tbody th", "all => all.map(e => e.firstChild.textContent.trim())"
    )
    return headings, variants


def test_page_sorts_by_value_and_leaves_what_failed_last(browser):
    """Sizes whose texts would sort otherwise (10.0 before 2.0), by mouse and by keyboard alone."""
    rows = [
        make_row("b", 10, 0.01),
        make_row("c", 2, 0.02),
        make_row("a", 9, 0.03),
        failed_row("gone"),
    ]
    tab, _ = open_page(browser, make_report(rows))
    assert order(tab) == (["KL divergence ascending"], ["b", "c", "a", "broken"])
    heads = tab.locator(".sortable th button")
    heads.nth(2).click()
    assert order(tab) == (["MiB ascending"], ["c", "a", "b", "broken"])
    heads.nth(2).focus()
    tab.keyboard.press("Enter")
    assert order(tab) == (["MiB descending"], ["b", "a", "c", "broken"])
    heads.nth(0).focus()
    tab.keyboard.press("Space")
    assert order(tab) == (["variant ascending"], ["a", "b", "c", "broken"])


def test_page_opens_a_flip_by_keyboard_to_the_prompt_and_both_answers(browser):
    tab, _ = open_page(browser, complete_report())
    prompt = tab.get_by_text("The colour of grass?").first
    assert not prompt.is_visible()
    for text in ("answer flips", "q7"):
        tab.locator("summary", has_text=text).first.focus()
        tab.keyboard.press("Enter")
    assert prompt.is_visible()
    shown = tab.locator("dl", has_text="The colour of grass?").first.inner_text()
    assert all(word in shown for word in ("right answer", "green", "full precision", "blue"))


def test_page_reaches_every_part_that_scrolls_and_every_control_by_the_tab_key(browser):
    tab, _ = open_page(browser, complete_report(), PHONE)
    controls = tab.locator("a, button, input, summary, .wide")
    wanted = controls.evaluate_all("all => all.filter(e => e.checkVisibility()).length")
    position = "[...document.querySelectorAll('*')].indexOf(document.{})"
    reached = set()
    for _ in range(wanted + 1):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate(position.format("activeElement")))
    reached.discard(tab.evaluate(position.format("body")))
    assert len(reached) == wanted > 20


def each_state() -> Iterator:
    """Yield each way to meet the page; all but one in each colour scheme are slow."""
    for state in product(["closed", "open"], ["light", "dark"], [PHONE, DESKTOP]):
        fast = state in (("open", "light", DESKTOP), ("open", "dark", PHONE))
        yield pytest.param(*state, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("parts", "scheme", "width"), each_state())
def test_page_has_nothing_serious_for_axe(browser, parts, scheme, width):
    """Deque's axe-core, all its rules: as a person meets the page, and with all unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    tab, requests = open_page(browser, complete_report(), width, scheme)
    if parts == "open":
        tab.eval_on_selector_all("details", UNFOLD)
    violations = []
    for violation in Axe().run(tab).response["violations"]:
        nodes = [node["html"][:200] for node in violation["nodes"]]
        violations.append((violation["id"], violation["impact"], nodes))
    serious = [violation for violation in violations if violation[1] in ("serious", "critical")]
    assert serious == [], violations
    assert requests == []  # nothing was fetched


def test_axe_would_find_a_contrast_that_is_too_low(browser):
    from axe_playwright_python.sync_playwright import Axe

    tab, _ = open_page(browser, complete_report())
    tab.add_style_tag(content=".soft { color: #d8d8d8 !important; }")
    violations = Axe().run(tab).response["violations"]
    assert "color-contrast" in {violation["id"] for violation in violations}


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_page_has_no_part_wider_than_the_screen(browser, width):
    """Wide tables scroll in a part of their own."""
    tab, _ = open_page(browser, complete_report(), width)
    tab.eval_on_selector_all("details", UNFOLD)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
