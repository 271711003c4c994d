"""The server's page in a real browser: pictures, labels, errors, and no request to anybody else."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from export.predict import Predictor
from tests.browser import chromium, requests
from tests.export.serve.servers import Server, get


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[webdriver.Chrome]:
    with chromium() as browser:
        browser.get(f"http://127.0.0.1:{server.port}/")
        yield browser


def test_pictures_get_labels_and_bad_files_a_line(
    page: webdriver.Chrome, server: Server, model: Path, photos: Sequence[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "<b>bad.png"
    bad.write_bytes(b"no image")
    page.find_element(By.NAME, "image").send_keys("\n".join(map(str, (photos[0], bad, photos[1]))))
    page.find_element(By.TAG_NAME, "button").click()
    WebDriverWait(page, 20).until(lambda browser: len(browser.find_elements(By.TAG_NAME, "article")) == 3)
    articles = page.find_elements(By.TAG_NAME, "article")
    for article, photo in ((articles[0], photos[0]), (articles[2], photos[1])):
        (expected,) = Predictor(model).predict(photo)
        shown = [row.text.split() for row in article.find_elements(By.TAG_NAME, "tr")]
        pairs = zip(expected.classes, expected.probabilities, strict=True)
        assert shown == [[name, f"{100 * p:.1f}", "%"] for name, p in pairs]
        picture = article.find_element(By.TAG_NAME, "img")
        WebDriverWait(page, 20).until(lambda _, picture=picture: picture.get_property("naturalWidth") == 40)
    assert articles[1].find_element(By.TAG_NAME, "b").text == bad.name
    assert "not an image" in articles[1].text
    address = f"http://127.0.0.1:{server.port}/"
    assert set(requests(page)) <= {address, f"{address}predict?top_k=5", f"{address}favicon.ico"}
    assert [entry for entry in page.get_log("browser") if "favicon" not in entry["message"]] == []


def test_the_policy_stops_other_scripts(page: webdriver.Chrome, server: Server) -> None:
    """A script that somebody gets into the page does not run, and asks for nothing."""
    page.execute_script("""
        const script = document.createElement("script");
        script.textContent = "document.title = 'changed'";
        document.body.append(script);""")
    assert page.title == "Classify images"
    connection = server.connect()
    policy = get(connection, "/").headers["content-security-policy"]
    connection.close()
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
