"""The whole site in headless Chromium: nothing is broken, everything can be read, tables sort and filter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from playwright.sync_api import Browser, Page, sync_playwright
from synthetic import study, world

from reports import frame, numbers, site, study_page

SMALL = {"tasks": ["movie-sentiment", "bigram-shift"], "rows": ["full", "head", "lora", "rslora", "lora-plus", "gora"],
         "budgets": [{"rank": 2}, {"rank": 8}], "test": 100, "train": 256}
#: Where a browser is looked for; `$CHROMIUM` names another.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: Pages of every kind, by the beginning of their path; of each kind the first is looked at closely.
KINDS = ("index.html", "history.html", "synthetic-desk/", "methods/index", "methods/", "tasks/", "published/index",
         "published/", "runs/")
WIDTHS = (1400, 390)

#: Texts whose contrast with what is behind them is below WCAG AA: 4.5, or 3 for large ones. Colours are drawn to a
#: canvas, which understands every notation; half-transparent backgrounds are laid over each other.
CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = text; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (colour) => {
    const part = (x) => (x /= 255, x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(colour[0]) + 0.7152 * part(colour[1]) + 0.0722 * part(colour[2]);
  };
  const found = [];
  let checked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const at = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || at.closest(".hidden, .skip") || !at.getClientRects().length) continue;
    const style = getComputedStyle(at);
    const behind = [];
    for (let box = at; box; box = box.parentElement) behind.unshift(rgba(getComputedStyle(box).backgroundColor));
    if (at.closest("svg")) { // a number may stand on a coloured square
      at.scrollIntoView({ behavior: "instant", block: "center", inline: "center" });
      const box = at.getBoundingClientRect();
      const under = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2)
        .filter((one) => one.matches("path, rect, use, polygon") && getComputedStyle(one).fill !== "none");
      behind.push(...under.reverse().map((one) => rgba(getComputedStyle(one).fill)));
    }
    const paper = behind.reduce((below, top) => over(top, below), rgba("Canvas"));
    const ink = over(rgba(at.closest("svg") && style.fill !== "none" ? style.fill : style.color), paper);
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    checked += 1;
    if (ratio < (large ? 3 : 4.5)) found.push([walker.currentNode.textContent.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return { checked, found };
}"""


def executable() -> str:
    """The browser. Without one the test fails: a machine that checks this project has one (`.ci/run` installs it)."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("no Chromium on this machine: install it (Debian: `apt-get install chromium`) or set CHROMIUM to "
                    "its path")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A site of one study with everything in it: several ranks, missing and failed runs."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_RESULTS", str(folder / "results"))
        made = world(study(**SMALL), fate=lambda cell: synthetic.half(cell) if cell.row == "lora-plus" else "finished")
        chapter = study_page.Chapter.of(made.study, made.scale, made.cells, made.records)
        site.build([chapter], folder / "out", mlflow="http://127.0.0.1:5000")
        yield folder / "out"


def pages(built: Path) -> list[Path]:
    """A page of every kind; all kinds are there."""
    every = sorted(path.relative_to(built).as_posix() for path in built.rglob("*.html"))
    found = []
    for kind in KINDS:
        first = next((path for path in every if path.startswith(kind) and built / path not in found), None)
        assert first is not None, kind
        found.append(built / first)
    return found


def opened(browser: Browser, path: Path, width: int = 1400, scheme: Any = "light") -> tuple[Page, list[str]]:
    """A page in a window, all of it unfolded, and what its console and its requests complained of."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    return page, wrong


def test_every_link_and_image_of_every_page_leads_somewhere(built: Path, browser: Browser) -> None:
    page = browser.new_context().new_page()
    ids: dict[Path, set[str]] = {}
    links: set[tuple[Path, Path, str]] = set()
    for path in sorted(built.rglob("*.html")):
        page.goto(path.as_uri(), wait_until="commit")
        page.wait_for_load_state("domcontentloaded")
        told = page.evaluate("""() => ({
          ids: [...document.querySelectorAll("[id]")].map((one) => one.id),
          links: [...document.querySelectorAll("a[href], link[href]")].map((one) => one.getAttribute("href")),
          images: [...document.images].map((one) => [one.getAttribute("src"), one.getAttribute("alt")])})""")
        ids[path.resolve()] = set(told["ids"])
        assert all(alt for _, alt in told["images"])
        for target in [*told["links"], *(source for source, _ in told["images"])]:
            if not target.startswith(("https://", "http://127.0.0.1:5000", "data:")):
                file, _, anchor = target.partition("#")
                links.add((path, (path.parent / file).resolve() if file else path.resolve(), anchor))
    assert len(ids) > 50
    assert len(links) > 500
    assert [(str(path), str(target)) for path, target, _ in links if not target.exists()] == []
    assert [(str(path), anchor) for path, target, anchor in links if anchor and anchor not in ids[target]] == []


def test_everything_is_two_clicks_from_the_overview(built: Path, browser: Browser) -> None:
    near = {built / "index.html"}
    for _ in range(2):
        for path in sorted(near):
            page, _ = opened(browser, path)
            hrefs = page.evaluate("[...document.querySelectorAll('a[href]')].map((one) => one.getAttribute('href'))")
            near |= {target for href in hrefs if "://" not in href
                     and (target := (path.parent / href.split("#")[0]).resolve()).suffix == ".html"}
            page.context.close()
    kinds = {path.relative_to(built.resolve()).parts[0] for path in map(Path.resolve, near)}
    assert {"methods", "tasks", "published", "runs", "synthetic-desk", "history.html"} <= kinds


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_and_nothing_complains(built: Path, browser: Browser, scheme: str) -> None:
    for path in pages(built):
        page, wrong = opened(browser, path, scheme=scheme)
        told = page.evaluate(CONTRAST)
        assert told["checked"] > 10, path
        assert told["found"] == [], path
        assert wrong == [], path
        page.context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window(built: Path, browser: Browser, width: int) -> None:
    for path in pages(built):
        page, _ = opened(browser, path, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        page.context.close()


def test_drawings_and_controls_have_names(built: Path, browser: Browser) -> None:
    for path in pages(built):
        page, _ = opened(browser, path)
        assert page.evaluate("""[...document.querySelectorAll("svg, img, input, [role=region]")].filter((one) =>
          !["aria-label", "aria-hidden", "alt"].some((name) => one.getAttribute(name)) && !one.labels?.length
        ).map((one) => one.outerHTML.slice(0, 80))""") == [], path
        assert page.evaluate("document.documentElement.lang") == "en"
        page.context.close()


def test_tables_sort_by_number_and_by_word_from_the_keyboard(built: Path, browser: Browser) -> None:
    page, _ = opened(browser, built / "synthetic-desk" / "index.html")
    table = page.locator("table.sortable", has=page.locator("caption", has_text="Measured")).first

    def column(place: int) -> list[str]:
        texts = table.locator(f"tbody tr > :nth-child({place})").all_inner_texts()
        return [text.split(" ± ")[0].split("\n")[0].strip() for text in texts]

    before = column(1)
    head = table.locator("thead th").nth(3)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(text) for text in column(4) if text[:1].isdigit()]
    assert len(values) >= 8
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(4) if text[:1].isdigit()] == sorted(values)
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") is None
    assert column(1) == before
    table.locator("thead th button").first.click()
    assert table.locator("thead th").first.get_attribute("aria-sort") == "ascending"
    assert column(1)[0] == "Full fine-tuning"
    assert column(1)[-2:] == ["rsLoRA, r = 2", "rsLoRA, r = 8"]
    assert sorted(column(1)) == sorted(before)


def test_sizes_and_times_sort_by_what_they_mean(browser: Browser) -> None:
    page = browser.new_context().new_page()
    means = {"1 h 12 min": 4320, "4 min 05 s": 245, numbers.seconds(4329): 4320, "38 s": 38, "0.42 s": 0.42,
             "1.4 GiB": 1.4 * 2**30, "980 MiB": 980 * 2**20, numbers.short(3e5): 3e5, "1.23 M": 1.23e6, "−1.2 [−2, 0]": -1.2,
             "+0.4": 0.4, "r = 8": 8, numbers.count(49152): 49152, "× 0.5": 0.5, "2026-01-02 03:04": None, "—": None,
             "failed": None, "8-bit": 8}
    page.add_script_tag(path=frame.TEMPLATES / "site.js")
    assert page.evaluate("(texts) => texts.map(number)", list(means)) == list(means.values())


def test_rows_can_be_filtered(built: Path, browser: Browser) -> None:
    page, _ = opened(browser, built / "synthetic-desk" / "index.html")
    part = page.locator(".sheet", has=page.locator("caption", has_text="Measured")).first
    rows = part.locator("tbody tr")
    every = rows.count()
    part.get_by_label("Filter rows").fill("RSLORA r")
    shown = [row for row in rows.all() if row.is_visible()]
    assert [row.locator("th").inner_text() for row in shown] == ["rsLoRA, r = 2", "rsLoRA, r = 8"]
    assert part.locator("output").inner_text() == f"2 of {every} rows"
    part.get_by_label("Filter rows").fill("")
    assert all(row.is_visible() for row in rows.all())


def test_without_a_script_tables_are_whole_and_plain(built: Path, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((built / "synthetic-desk" / "index.html").as_uri())
    table = page.locator("table.sortable").first
    assert table.locator("tbody tr").count() >= 10
    assert page.locator("button, input").count() == 0
    context.close()
