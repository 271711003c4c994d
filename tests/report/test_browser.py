"""The page in a real browser: clicks, keys, filters, the exported list, and that it asks nobody for anything."""

import csv
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from resnet_dist.config.schema import DataConfig
from resnet_dist.data.index import read_index
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.run import to_csv, write_atomically
from resnet_dist.report.page import write_page
from resnet_dist.report.page_content import evaluation_content
from tests.browser import chromium, requests
from tests.conftest import CLASSES
from tests.report.pages import HOSTILE, made_evaluation

ODD = ("<script>alert(1)</script>.jpg", 'quo"ted,\nname.jpg', "caf\udce9.jpg", "ünï😀.jpg")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[webdriver.Chrome]:
    with chromium("--window-size=1200,900", downloads=downloads) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """60 images of three classes, some with file names that are hard to get right."""
    return made_evaluation(tmp_path_factory.mktemp("browser"), CLASSES, 60, names=ODD)


def put(evaluation: Evaluation, file: Path) -> Path:
    write_page(file, "A page", evaluation_content(evaluation, None, None, {}))
    return file


@pytest.fixture
def page(browser: webdriver.Chrome, evaluation: Evaluation, tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """The browser with the page just opened; afterwards, that it logged nothing and asked for nothing."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what an earlier page left
    file = put(evaluation, tmp_path / "report.html")
    browser.get(file.as_uri())
    assert browser.find_element(By.TAG_NAME, "body").get_attribute("data-ready") == "yes"
    yield browser
    assert browser.get_log("browser") == []
    assert set(requests(browser)) <= {file.as_uri()}


def cell(browser: webdriver.Chrome, row: int, column: int) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f".matrix td[data-row='{row}'][data-column='{column}']")


def shown(browser: webdriver.Chrome) -> list[str]:
    """The paths of the images that the gallery shows, through all of its pages."""
    gallery = browser.find_element(By.CSS_SELECTOR, "section[aria-labelledby='images']")
    found = []
    while True:
        cards = gallery.find_elements(By.CSS_SELECTOR, ".card .path")
        found += browser.execute_script("return arguments[0].map((one) => one.textContent.toWellFormed())", cards)
        following = gallery.find_element(By.XPATH, ".//button[text()='Next']")
        if not following.is_enabled():
            return found
        following.click()


def of_cell(evaluation: Evaluation, target: int, prediction: int) -> set[str]:
    records = evaluation.records
    mask = (records.target == target) & (records.prediction == prediction)
    return {as_script(evaluation.paths[i]) for i in range(len(mask)) if mask[i]}


def as_script(path: str) -> str:
    """A path as the driver hands text over: a byte that is no text does not survive the way."""
    return re.sub("[\udc80-\udcff]", "\ufffd", path)


def wait(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true, within ten seconds."""
    end = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def test_a_cell_shows_its_images(page: webdriver.Chrome, evaluation: Evaluation) -> None:
    counts = {(t, p): of_cell(evaluation, t, p) for t in range(3) for p in range(3)}
    (target, prediction), wanted = next(
        (pair, paths) for pair, paths in counts.items() if paths and len(set(pair)) == 2
    )
    assert cell(page, target, prediction).text == str(len(wanted))
    cell(page, target, prediction).click()
    assert set(shown(page)) == wanted
    assert page.switch_to.active_element.get_attribute("id") == "images"
    cell(page, 1, 1).click()
    assert set(shown(page)) == counts[1, 1]


@pytest.mark.matrix
def test_matrix_works_with_the_keyboard(page: webdriver.Chrome, evaluation: Evaluation) -> None:
    """One tab stop; arrows move, the words follow, Enter and Space open."""
    assert len(page.find_elements(By.CSS_SELECTOR, ".matrix td[tabindex='0']")) == 1
    cell(page, 0, 0).send_keys(Keys.ARROW_DOWN, Keys.NULL)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    active = page.switch_to.active_element
    assert (active.get_attribute("data-row"), active.get_attribute("data-column")) == ("1", "1")
    words = page.find_element(By.ID, "cell").text
    assert words.startswith(f"label dog, predicted dog: {len(of_cell(evaluation, 1, 1))} images")
    assert active.get_attribute("aria-label") == words
    assert page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active) == "solid"
    active.send_keys(Keys.ENTER)
    assert set(shown(page)) == of_cell(evaluation, 1, 1)
    cell(page, 2, 2).send_keys(Keys.SPACE)
    assert set(shown(page)) == of_cell(evaluation, 2, 2)
    cell(page, 2, 2).send_keys(Keys.HOME)
    assert page.switch_to.active_element.get_attribute("data-column") == "0"


@pytest.mark.matrix
def test_every_control_is_reached_with_tab(page: webdriver.Chrome) -> None:
    """The first stop skips to the content; of the matrix one stop; every control has a name."""
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the content"
    stops = []
    for _ in range(40):
        page.switch_to.active_element.send_keys(Keys.TAB)
        stops.append(page.switch_to.active_element)
    assert sum(stop.tag_name == "td" for stop in stops) == 1
    ids = [stop.get_attribute("id") for stop in stops]
    order = ["filter-text", "filter-label", "filter-prediction", "filter-order", "filter-wrong"]
    assert [name for name in ids if name in order] == order
    controls = page.find_elements(By.CSS_SELECTOR, "button, select, input, [tabindex='0']")
    assert all(control.accessible_name or control.aria_role == "gridcell" for control in controls[:80])
    assert page.execute_script("return [...document.images].every((image) => image.alt)")


@pytest.mark.matrix
def test_filters_of_the_gallery(page: webdriver.Chrome, evaluation: Evaluation) -> None:
    records = evaluation.records
    wrong = {as_script(evaluation.paths[i]) for i in (records.target != records.prediction).nonzero()[0]}
    page.find_element(By.ID, "filter-wrong").send_keys(Keys.SPACE)
    assert set(shown(page)) == wrong
    Select(page.find_element(By.ID, "filter-label")).select_by_visible_text("dog")
    dogs = {p for i, p in enumerate(map(as_script, evaluation.paths)) if records.target[i] == 1}
    assert set(shown(page)) == wrong & dogs
    page.find_element(By.XPATH, "//button[text()='Show all']").click()
    assert len(shown(page)) == 60
    page.find_element(By.ID, "filter-text").send_keys("0001")
    assert set(shown(page)) == {f"{i:05d}.jpg" for i in range(10, 20)}
    page.find_element(By.ID, "filter-text").clear()
    page.find_element(By.ID, "filter-text").send_keys("EMU")
    emus = {
        p for i, p in enumerate(map(as_script, evaluation.paths)) if 2 in (records.target[i], records.prediction[i])
    }
    assert set(shown(page)) == emus
    page.find_element(By.XPATH, "//button[text()='Show all']").click()
    Select(page.find_element(By.ID, "filter-order")).select_by_visible_text("lowest loss first")
    losses = dict(zip(map(as_script, evaluation.paths), records.loss.tolist(), strict=True))
    found = [losses[path] for path in shown(page)]
    assert len(found) == 60 and found == pytest.approx(sorted(found), rel=1e-3)  # the page has four digits


@pytest.mark.matrix
def test_marked_labels_are_exported(page: webdriver.Chrome, evaluation: Evaluation, downloads: Path) -> None:
    """Of odd names byte for byte, as Python's own reader takes them; a mark shows wherever the image does."""
    content = evaluation_content(evaluation, None, None, {})
    rows = [content["images"]["path"].index(name) for name in ODD]
    page.execute_script("for (const row of arguments[0]) mark(row, true);", rows)
    Select(page.find_element(By.ID, "filter-order")).select_by_visible_text("by path")
    box = page.find_element(By.CSS_SELECTOR, "section[aria-labelledby='images'] .card input")
    box.send_keys(Keys.SPACE)
    box.send_keys(Keys.SPACE)
    boxes = page.find_elements(By.CSS_SELECTOR, f"input[data-row='{box.get_attribute('data-row')}']")
    assert len({one.is_selected() for one in boxes}) == 1
    before = page.find_element(By.ID, "marked").text
    assert before.startswith(f"{len(ODD)} images marked")
    page.find_element(By.ID, "export").click()
    wait(lambda: (downloads / "marked.csv").exists())
    with (downloads / "marked.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        found = list(csv.DictReader(stream))
    records, place = evaluation.records, {path: i for i, path in enumerate(evaluation.paths)}
    assert {row["path"] for row in found} == set(ODD)
    for row in found:
        at = place[row["path"]]
        assert list(row) == ["path", "target", "prediction", "mark"]
        wanted = [CLASSES[records.target[at]], CLASSES[records.prediction[at]], "exclude"]
        assert [row["target"], row["prediction"], row["mark"]] == wanted
    manifest = evaluation.root / "manifest.csv"
    labels = [(path, CLASSES[target]) for path, target in zip(evaluation.paths, records.target, strict=True)]
    write_atomically(manifest, to_csv(("path", "label"), labels))
    index = read_index(DataConfig(data=str(manifest), exclude_list=str(downloads / "marked.csv")))
    assert set(evaluation.paths) - {*index.train.paths, *index.val.paths} == set(ODD)  # what train would leave out
    page.find_element(By.XPATH, "//button[text()='Clear']").click()
    assert not page.find_element(By.ID, "marked").is_displayed()


@pytest.mark.matrix
def test_class_table_can_be_sorted(page: webdriver.Chrome, evaluation: Evaluation) -> None:
    table = page.find_element(By.CSS_SELECTOR, "section[aria-labelledby='classes'] table")
    heading = table.find_element(By.XPATH, ".//th[.='recall']")

    def recalls() -> list[float]:
        return [
            float(row.find_elements(By.TAG_NAME, "td")[3].text) for row in table.find_elements(By.XPATH, "./tbody/tr")
        ]

    records = evaluation.records
    true = [(records.prediction[records.target == c] == c).mean() for c in range(3)]
    for direction, wanted in (("ascending", sorted(true)), ("descending", sorted(true, reverse=True))):
        heading.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert heading.get_attribute("aria-sort") == direction
        assert recalls() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.matrix
def test_point_of_the_embedding_shows_its_image(page: webdriver.Chrome, evaluation: Evaluation, tmp_path: Path) -> None:
    """The map is there where embeddings are, with a dot for every image."""
    content = evaluation_content(evaluation, None, None, {})
    content["map"] = [[row, row % 8, row // 8] for row in range(60)]
    write_page(tmp_path / "report.html", "A page", content)
    page.get((tmp_path / "report.html").as_uri())
    dots = page.find_elements(By.CSS_SELECTOR, "svg.dots circle")
    assert len(dots) == 60
    row = content["images"]["path"].index("00017.jpg")
    dots[row].click()
    assert shown(page) == ["00017.jpg"]


@pytest.mark.matrix
def test_hostile_names_run_no_script(page: webdriver.Chrome, tmp_path: Path) -> None:
    """Classes and title that are markup are shown as they are: no dialog opens, no element appears."""
    evaluation = made_evaluation(tmp_path / "hostile", HOSTILE, 12, names=ODD)
    file = tmp_path / "report.html"  # the page that the fixture expects
    write_page(file, HOSTILE[0], evaluation_content(evaluation, None, None, {}))
    page.get(file.as_uri())
    assert page.title == HOSTILE[0]
    assert page.find_elements(By.CSS_SELECTOR, "img[src='x'], main script") == []
    options = Select(page.find_element(By.ID, "filter-label")).options
    assert [option.get_attribute("textContent") for option in options][1:] == list(HOSTILE)


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_theme_and_have_contrast(page: webdriver.Chrome, scheme: str) -> None:
    """Text against its ground at a contrast of at least 4.5 to 1 (WCAG 2.1, level AA)."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colours = page.execute_script(
        "const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['back', 'panel', 'text', 'dim', 'accent', 'right', 'wrong']"
        ".map((name) => [name, style.getPropertyValue('--' + name).trim()]));"
    )
    assert (luminance(colours["back"]) < 0.1) == (scheme == "dark")
    for ground in ("back", "panel"):
        for name in ("text", "dim", "accent", "right", "wrong"):
            bright, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


@pytest.mark.matrix
def test_classes_that_the_matrix_leaves_out_are_listed(page: webdriver.Chrome, tmp_path: Path) -> None:
    classes = tuple(f"class {i:03d}" for i in range(130))
    evaluation = made_evaluation(tmp_path / "many", classes, 130, side=8)
    file = put(evaluation, tmp_path / "report.html")  # the page that the fixture expects
    page.get(file.as_uri())
    headings = page.find_elements(By.CSS_SELECTOR, ".matrix tbody th")
    in_matrix = [heading.get_attribute("textContent") for heading in headings]
    listed = page.find_element(By.CSS_SELECTOR, "#left-out p").get_attribute("textContent") or ""
    assert len(in_matrix) == 120 and sorted([*in_matrix, *listed.split(", ")]) == list(classes)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.matrix
def test_a_hundred_classes_and_five_thousand_images(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Under 15 MB for any pictures; nothing is wider than a telephone; cells can be reached with the keyboard."""
    classes = tuple(f"class {i:03d}" for i in range(100))
    file = put(made_evaluation(tmp_path / "big", classes, 5000, side=128), tmp_path / "big.html")
    assert file.stat().st_size < 15_000_000
    start = time.perf_counter()
    browser.get(file.as_uri())
    took = time.perf_counter() - start
    print(f"{file.stat().st_size / 1e6:.1f} MB, open in {took:.2f} s")
    for axis in ("thead", "tbody"):
        headings = browser.find_elements(By.CSS_SELECTOR, f".matrix {axis} th:not(.corner)")
        assert [heading.get_attribute("textContent") for heading in headings] == list(classes)
    assert browser.find_element(By.CSS_SELECTOR, ".matrix .corner").text.split() == ["label", "↓", "predicted", "→"]
    assert browser.find_elements(By.ID, "left-out") == []
    assert len(browser.find_elements(By.TAG_NAME, "img")) < 200
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        cell(browser, 0, 0).send_keys(Keys.ARROW_DOWN)
        browser.switch_to.active_element.send_keys(Keys.END)
        assert browser.find_element(By.ID, "cell").text.startswith("label class 001, predicted class 099: 0 images")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
