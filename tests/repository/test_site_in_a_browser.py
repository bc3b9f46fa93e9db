"""The built site in a real browser: no error in its console, formulas typeset, a search that finds, two widths.

Skipped without Chromium, playwright or a built site: ``make docs`` first.
"""

import contextlib
import functools
import http.server
import json
import shutil
import threading

import pytest
from paths import ROOT

SITE, SITES = ROOT / "site", ROOT / "sites"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if CHROMIUM is None or not (SITE / "index.html").exists():
    pytest.skip("no Chromium, or the site is not built (make docs)", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Prints nothing, because the requests are ours."""


@contextlib.contextmanager
def served(folder):
    """Serves a folder on the loopback interface: a browser gives pages of a file no worker, which the search needs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def address():
    with served(SITE) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1440])
def test_every_page_loads_without_an_error_and_fits(browser, address, width):
    page, errors = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    pages = sorted(path for path in SITE.rglob("*.html") if path.name != "404.html")
    assert len(pages) > 30
    for path in pages:
        page.goto(f"{address}/{path.relative_to(SITE).as_posix()}", wait_until="load")
        assert page.locator("h1").count() == 1, path
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path.name} is {wide} pixels wider than the window"
    assert errors == []
    page.close()


def test_formulas_are_typeset(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    formulas = page.locator("math")
    assert formulas.count() >= 3 and all(box["height"] > 5 for box in map(lambda x: x.bounding_box(), formulas.all()))
    assert "\\rho" not in page.inner_text("article")
    page.close()


SPLIT = """[...document.querySelectorAll('td code')]
    .filter(code => /^[A-Za-z_]{1,28}$/.test(code.textContent) && code.getClientRects().length > 1)
    .map(code => code.textContent)"""


@pytest.mark.parametrize("name", ["index", "api", "objectives", "metrics", "guarantees"])
def test_a_name_in_a_table_stays_in_one_piece_on_a_phone(browser, address, name):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(f"{address}/{name}.html")
    assert page.locator("td code").count() > 5 and page.evaluate(SPLIT) == []
    page.close()


def test_a_bar_in_the_code_of_a_table_has_no_backslash(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/objectives.html")
    assert "|log pi - log ref|" in page.inner_text("article") and "\\|" not in page.inner_text("article")
    page.close()


def test_an_example_of_the_reference_is_a_program_with_its_output(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/reference/losses.html")
    assert page.locator("blockquote").count() == 0
    assert sum(text.startswith(">>>") for text in page.locator(".highlight code").all_inner_texts()) > 10
    page.close()


ROWS = """[...document.querySelectorAll('tr.doc-section-item')]
    .map(row => [...row.cells].map(cell => cell.innerText.trim()))"""


def test_a_row_of_the_reference_holds_a_whole_result_and_no_default_that_is_not_one(browser, address):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{address}/reference/losses.html")
    rows = page.evaluate(ROWS)
    names, results = [r for r in rows if len(r) == 4], [r[1] for r in rows if r[0].startswith("Scalar")]
    assert ["entropy, entropy_coef", ""] in [row[:2] for row in names]
    assert [row for row in names if row[3] == "required" and not row[1]] == []
    assert len(results) > 10 and [text for text in results if "``" in text or text[:1] in "-*d"] == []
    page.close()


def test_a_public_name_leads_to_its_place_in_the_reference(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/api.html")
    page.click("td a:has-text('linear_distillation_loss')")
    assert page.url.endswith("#rlkernels.linear_distillation_loss")
    assert "teacher_topk" in page.inner_text("article")
    page.close()


def test_a_table_of_the_page_fits_on_a_wide_screen(browser, address):
    """Of one that scrolls, a reader sees no more than that a column is missing."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    wide = "[...document.querySelectorAll('.md-typeset__scrollwrap')].filter(x => x.scrollWidth > x.clientWidth).length"
    for path in sorted(SITE.rglob("*.html")):
        page.goto(f"{address}/{path.relative_to(SITE).as_posix()}")
        assert page.evaluate(wide) == 0, path.name
    page.close()


def test_each_exception_of_the_reference_has_a_row(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/reference/agent-trajectories.html")
    cells = page.locator("td").all_inner_texts()
    assert "ValueError" in cells and not [text for text in cells if "Error: " in text]
    page.goto(f"{address}/reference/losses.html")
    cells = page.locator("td").all_inner_texts()
    assert "TypeError, ValueError" in cells and not [text for text in cells if text.startswith("(TypeError")]
    page.close()


def test_the_pictures_of_the_figures_are_shown(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/performance.html", wait_until="load")
    widths = page.evaluate("[...document.querySelectorAll('article img')].map(image => image.naturalWidth)")
    assert len(widths) == 6 and min(widths) > 0
    page.close()


@pytest.mark.parametrize("words", ["GSPO", "entropy bonus", "cu_seqlens"])
def test_the_search_finds(browser, address, words):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{address}/index.html")
    field = page.locator("input.md-search__input")
    field.press_sequentially(words)
    for _ in range(24):
        # The page looks for words when a key comes up. The first ones may come before its script listens.
        field.press("End")
        with contextlib.suppress(playwright.TimeoutError):
            page.wait_for_selector(".md-search-result__item", timeout=5000)
            break
    found = page.inner_text(".md-search-result").lower()
    assert all(word.lower() in found for word in words.split())
    page.close()


@pytest.mark.skipif(not (SITES / "versions.json").exists(), reason="no versions are built (make docs-version)")
def test_the_start_leads_to_a_version_whose_pages_name_it(browser):
    page, errors = browser.new_page(viewport={"width": 1440, "height": 900}), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    titles = [entry["title"] for entry in json.loads((SITES / "versions.json").read_text())]
    with served(SITES) as root:
        page.goto(f"{root}/index.html")
        page.wait_for_selector(".md-version")
        assert page.inner_text(".md-version__current").removesuffix("latest") in titles
        told = page.locator(".md-version__link").all_text_contents()
        assert [title.removesuffix("latest").strip() for title in told] == titles
    assert errors == []
    page.close()
