"""The report in a browser, by its real elements: it needs no network, is quick, and can be used by everybody.

They need the extra `browser` and a Chromium, CHROMIUM or one that is installed; CHROMIUM_FLAGS are its flags.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgrpo.run.page.document import write_report
from support.reported import ATTACK, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]' brings what drives a browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[browser]' brings axe")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 360, "height": 740}


def installed(playwright) -> str | None:
    """A Chromium to start: the one named, one of the system, or one that Playwright has installed."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def page() -> Iterator:
    """One page for all tests: some browsers have no second one. It keeps what it logs and asks for."""
    with sync_api.sync_playwright() as playwright:
        path = installed(playwright)
        if path is None:
            pytest.skip("no Chromium: CHROMIUM names one, and `playwright install chromium` brings one")
        flags = os.environ.get("CHROMIUM_FLAGS", "").split()
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        page = browser.new_context(viewport=WIDE).new_page()
        page.logged, page.asked = [], []
        page.on("console", lambda message: page.logged.append(message.text))
        page.on("pageerror", lambda error: page.logged.append(str(error)))
        page.on("request", lambda asked: page.asked.append(asked.url))
        page.on("dialog", lambda dialog: (page.logged.append(dialog.message), dialog.dismiss()))
        yield page
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `one`, as large as a real run, `two` and `three` of the drawn world, and pages of them."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one", 100, side=128, metrics=60, model="stable-diffusion")
    two, three = (write_run(folder / name, 20, seed=seed) for name, seed in (("two", 1), ("three", 2)))
    write_report(one)
    write_report(two)
    write_report(two, three)
    return folder


def open_page(page, path: Path, viewport=WIDE, scheme: str = "light") -> None:
    page.logged.clear()
    page.asked.clear()
    page.set_viewport_size(viewport)
    page.emulate_media(color_scheme=scheme)
    page.goto(path.as_uri())


def shown(page, selector: str) -> list[str]:
    """data-at of the pictures that can be seen."""
    return page.locator(f"{selector} img:visible").evaluate_all("found => found.map(each => each.dataset.at)")


def crossed(chart) -> bool:
    """Whether a line marks the iteration that is read."""
    return chart.locator(".cross").evaluate("each => getComputedStyle(each).display") != "none"


def test_a_hundred_iterations_open_at_once_without_a_word_or_a_request(page, runs: Path) -> None:
    path = runs / "one" / "report.html"
    assert path.stat().st_size < 5e6
    open_page(page, path)
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 2000  # milliseconds
    assert page.logged == []
    assert [url for url in page.asked if not url.startswith("data:")] == [path.as_uri()]


def test_prompts_stay_text(page, runs: Path) -> None:
    open_page(page, runs / "one" / "report.html")
    assert page.title() == "one · fastgrpo"
    assert page.locator(".prompt .said").first.inner_text().startswith(ATTACK)
    assert page.locator(f"img[alt^='{ATTACK[:9]}']").count() > 10
    assert page.locator("img:not([src^='data:image/webp'])").count() == 0
    assert page.locator("script").count() == 1


def test_the_slider_moves_the_pictures_by_keyboard(page, runs: Path) -> None:
    open_page(page, runs / "one" / "report.html")
    slider = page.get_by_role("slider", name="Drawn")
    assert shown(page, ".pictures") == ["0", "100"] * 8
    slider.focus()
    for key, expected in (("ArrowLeft", "95"), ("ArrowLeft", "90"), ("Home", "0"), ("ArrowRight", "5")):
        page.keyboard.press(key)
        assert shown(page, ".pictures") == ["0", expected] * 8
    assert slider.get_attribute("aria-valuetext") == "after iteration 5"
    assert page.locator(".heads .now").inner_text() == "after iteration 5"


def test_charts_show_their_values_at_an_iteration(page, runs: Path) -> None:
    """By the slider and below the pointer; and their lines can be hidden."""
    open_page(page, runs / "one" / "report.html")
    chart = page.locator(".chart", has=page.locator("figcaption", has_text="Reward"))
    values = chart.locator(".legend b")
    assert values.all_inner_texts() == ["0.6", "0.3", "1"]
    slider = page.get_by_role("slider", name="Values at")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "before training"
    assert values.all_inner_texts() == ["–", "–", "–"]
    page.keyboard.press("ArrowRight")
    assert values.all_inner_texts() == ["0.105", "0.3", "0.01"]
    unsafe = page.locator(".chart", has=page.locator("figcaption", has_text="Unsafe images")).locator(".legend b")
    assert unsafe.inner_text() == "80"  # the newest evaluation by then
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg[role]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * (46 + 266 / 2) / 320, box["y"] + box["height"] / 2)
    assert values.all_inner_texts() == ["0.35", "0.3", "0.5"]
    assert crossed(chart)
    page.mouse.move(0, 0)
    assert values.first.inner_text() == "0.105"
    page.keyboard.press("End")
    assert values.first.inner_text() == "0.6"
    assert not crossed(chart)
    lines = chart.locator("svg[role] g.line")
    chart.get_by_role("checkbox", name="positive").press("Space")
    assert [line.is_visible() for line in lines.all()] == [True, False, True]


def test_unsafe_pictures_are_blurred_until_somebody_wants_to_see_them(page, runs: Path) -> None:
    blurred = "found => found.map(each => getComputedStyle(each).filter !== 'none')"
    open_page(page, runs / "one" / "report.html")
    first, last = page.locator(".prompt img:visible").first, page.locator(".prompt img:visible").last
    states = [place.evaluate_all(blurred)[0] for place in (first, last, page.locator(".failures img").first)]
    assert states == [True, False, True]  # a prompt that asks for something unsafe, a benign one, a failure
    page.get_by_role("checkbox", name="Blur unsafe pictures").press("Space")
    assert page.locator("img:visible").evaluate_all(blurred).count(True) == 0
    open_page(page, runs / "report.html")
    assert page.get_by_role("checkbox", name="Blur unsafe pictures").count() == 0  # shapes that are drawn


def test_runs_are_compared_and_each_can_be_hidden(page, runs: Path) -> None:
    open_page(page, runs / "report.html")
    assert page.logged == []
    assert page.locator("#results thead th").all_inner_texts()[:3] == ["before → after", "two", "three"]
    row = page.locator("#results tr", has_text="overall").first
    assert row.locator("td").all_inner_texts() == ["70.0 → 45.0 [30.7, 60.2] of 40 better"] * 2
    assert page.locator("#differences tbody th").all_inner_texts() == ["seed"]
    chart = page.locator(".chart", has=page.locator("figcaption", has_text="Reward: all"))
    lines = chart.locator("svg[role] g.line")
    assert chart.locator(".legend b").all_inner_texts() == ["0.4333", "0.35"]
    page.get_by_role("checkbox", name="two").press("Space")
    assert [line.is_visible() for line in lines.all()] == [False, True]
    page.get_by_role("slider", name="Drawn").press("Home")
    assert shown(page, ".pictures") == ["0", "0"] * 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["two/report.html", "report.html"])
def test_axe_finds_nothing_in_either_scheme_and_narrow_pages_do_not_scroll_sideways(
    page, runs: Path, name: str, scheme: str
) -> None:
    open_page(page, runs / name, NARROW, scheme)
    page.locator("details").evaluate_all("found => found.forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 22, 28)") == (scheme == "dark")
    # Charts, prompts, failures and runs are made alike, and axe takes a second for each hundred elements.
    alike = ".chart:nth-of-type(n+3), .prompt:nth-of-type(n+4), .failures li:nth-of-type(n+4), #run-2 > :not(h2)"
    page.locator(alike).evaluate_all("found => found.forEach(each => each.remove())")
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], node["html"][:200]) for each in found for node in each["nodes"]] == []


def test_a_live_page_reads_itself_again_where_the_reader_is(page, runs: Path) -> None:
    path = write_report(runs / "two", output=runs / "live.html", again=1.0)
    open_page(page, path)
    page.locator("#metrics summary").click()
    page.get_by_role("slider", name="Drawn").press("Home")
    page.locator("#training").scroll_into_view_if_needed()
    place = page.locator("#training").bounding_box()["y"]
    write_report(runs / "two", output=path)  # the last page, which stays
    page.locator("body:not([data-again])").wait_for()
    assert page.locator("#metrics").evaluate("each => each.open")
    assert page.get_by_role("slider", name="Drawn").input_value() == "0"
    assert page.evaluate("document.activeElement.id") == "stop"
    # What says that the training goes on is gone, and the page as much shorter.
    assert page.locator("#training").bounding_box()["y"] == pytest.approx(place, abs=3)
