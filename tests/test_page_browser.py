"""The page in a real browser: sorting, keyboard, accessibility, nothing fetched. Needs chromium; without it, skipped."""

import shutil
from collections.abc import Iterator

import pytest
from test_report import TARGET, failed, report, row

from quantline.report import page
from quantline.config.params import Hardware

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PHONE, DESKTOP = 390, 1280
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def whole_report() -> dict:
    """A page with all of its parts: plots, flips, layers, smoke traces, estimates, gates of every verdict, a failure."""
    flip = {"id": "q7", "task": "facts", "prompt": "The colour of grass?", "reference": "green", "said": "blue",
            "baseline_said": "green", "baseline_correct": True, "correct": False}
    layer = {"name": "model.layers.0.mlp.down_proj", "type": "Q4_K", "bits": 4.5, "measure": "tr(ΔW H ΔWᵀ)", "error": 0.2,
             "plain": "round-to-nearest", "plain_error": 0.4}
    smoke = {"prompt": "One day", "output": " a fox", "checks": {"finite": True, "repeatable": False}}
    more = {"flips": [flip], "layers": [layer], "smoke": [smoke],
            "estimated": {"decode_tok_s": 50.0, "hardware": "small board", "provenance": "estimated", "formula": "16 ÷ 2"}}
    rows = [row("gguf-q4_k_m-curvature", 10, 0.01, pareto=True, **more), row("onnx-int8", 2, 0.095, format="onnx", **more),
            row("awq-w4g128", 9, 0.3, format="safetensors", **more), failed("gone")]
    return report(rows) | {"target": TARGET.model_copy(update={
        "hardware": Hardware(name="small board", bandwidth_gb_s=16), "context": 4096}).model_dump()}


def opened(browser, made: dict, width: int = DESKTOP, scheme: str = "light"):
    """(the page at that width, what it asked the network for)."""
    tab, asked = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_content(page.html(made))
    return tab, asked


def order(tab) -> tuple[list[str], list[str]]:
    """(the headings that say how their column is sorted, the variants from top to bottom)."""
    return (tab.eval_on_selector_all(".sortable th[aria-sort]", "all => all.map(e => e.innerText.trim() + ' ' + e.ariaSort)"),
            tab.eval_on_selector_all(".sortable tbody th", "all => all.map(e => e.firstChild.textContent.trim())"))


def test_a_heading_sorts_by_value_and_what_failed_stays_last(browser):
    """Sizes of which the text would sort otherwise: 10.0 before 2.0 before 9.0. By mouse, and by keyboard alone."""
    tab, _ = opened(browser, report([row("b", 10, 0.01), row("c", 2, 0.02), row("a", 9, 0.03), failed("gone")]))
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


def test_a_flip_opens_by_keyboard_to_the_prompt_and_both_answers(browser):
    tab, _ = opened(browser, whole_report())
    prompt = tab.get_by_text("The colour of grass?").first
    assert not prompt.is_visible()
    for summary in (tab.locator("summary", has_text="answer flips").first, tab.locator("summary", has_text="q7").first):
        summary.focus()
        tab.keyboard.press("Enter")
    assert prompt.is_visible()
    told = tab.locator("dl", has_text="The colour of grass?").first.inner_text()
    assert all(word in told for word in ("right answer", "green", "full precision", "blue"))


def test_every_part_that_scrolls_and_every_control_is_reached_by_the_tab_key(browser):
    tab, _ = opened(browser, whole_report(), PHONE)
    wanted = tab.locator("a, button, summary, .wide").evaluate_all("all => all.filter(e => e.checkVisibility()).length")
    reached = set()
    for _ in range(wanted + 1):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    reached.discard(tab.evaluate("[...document.querySelectorAll('*')].indexOf(document.body)"))
    assert len(reached) == wanted > 20


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("parts", ["closed", "open"])
def test_axe_finds_nothing_serious(browser, width, scheme, parts):
    """Deque's axe-core, all its rules: closed as a person meets the page, and with everything unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    tab, asked = opened(browser, whole_report(), width, scheme)
    if parts == "open":
        tab.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    found = [(one["id"], one["impact"], [node["html"][:200] for node in one["nodes"]])
             for one in Axe().run(tab).response["violations"]]
    assert [one for one in found if one[1] in ("serious", "critical")] == [], found
    assert asked == []  # and nothing was fetched


def test_axe_would_find_a_contrast_that_is_too_low(browser):
    from axe_playwright_python.sync_playwright import Axe

    tab, _ = opened(browser, whole_report())
    tab.add_style_tag(content=".soft { color: #d8d8d8 !important; }")
    assert "color-contrast" in {one["id"] for one in Axe().run(tab).response["violations"]}


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_part_is_wider_than_the_screen(browser, width):
    """Wide tables scroll in a part of their own."""
    tab, _ = opened(browser, whole_report(), width)
    tab.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
