"""`export --web` in a real browser: it classifies as predict does, and neither the page nor its worker can ask anybody
else for anything."""

import functools
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from safetensors.torch import load_file
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from torchvision.models import ResNet18_Weights, resnet18

from export.browser import MODELS, PARTS, RUNTIME, write_web
from export.bundle import put_in_place
from export.predict import ORIENTATION, Predictor, Preprocessing
from resnet_dist.cli.main import main
from resnet_dist.config.schema import ModelConfig
from resnet_dist.model.checkpoint import Description, save_best
from resnet_dist.model.resnet import Architecture
from tests.browser import chromium, requests
from tests.conftest import CLASSES, write_image
from tests.report.pages import HOSTILE

OUTSIDE = "http://outside.example/"
BROWSERS_OWN = re.compile(r"^(http://)?[\w.-]+\.(google|googleapis)\.com[:/]")  # what Chromium asks by itself


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that knows the type of HTML, CSS and JavaScript alone, as some do."""

    extensions_map: ClassVar[dict[str, str]] = {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        "": "application/octet-stream",
    }
    isolated = False

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Isolated(Quiet):
    isolated = True


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """The address of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def asked_outside() -> Iterator[list[str]]:
    """Every request of the browser that is not to this machine, but for those that no page causes."""
    yield []


@pytest.fixture(scope="module")
def browser(asked_outside: list[str]) -> Iterator[webdriver.Chrome]:
    """Chromium whose only way out is a proxy that refuses everything and notes the addresses."""

    class Proxy(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if not BROWSERS_OWN.search(self.path):
                asked_outside.append(self.path)
            self.send_error(502)

        do_GET = do_POST = do_CONNECT = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Proxy) as proxy, chromium(f"--proxy-server={proxy}", "--window-size=1200,900") as chrome:
        yield chrome


@contextmanager
def opened(browser: webdriver.Chrome, folder: Path, handler: type[Quiet] = Quiet) -> Iterator[dict[str, Any]]:
    """The page with its model loaded; what it says about that. Afterwards, that it logged and asked nothing."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what an earlier page left
    with serving(functools.partial(handler, directory=str(folder))) as address:
        browser.get(f"{address}/index.html")
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#status[data-ready]") or "Error" in said(browser))
        assert said(browser) == "The model is ready; its self-test passes in this browser."
        yield json.loads(str(browser.find_element(By.ID, "status").get_attribute("data-ready")))
        assert browser.get_log("browser") == []
        assert {page.rpartition("/")[0] for page in requests(browser)} == {address}
        browser.get("about:blank")


def said(browser: webdriver.Chrome) -> str:
    found = browser.find_elements(By.ID, "status")
    return found[0].text if found else ""


def wait(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def classified(browser: webdriver.Chrome, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Choose files in the page, and read what it shows for each."""
    already = len(browser.find_elements(By.CSS_SELECTOR, ".card"))
    browser.find_element(By.ID, "pictures").send_keys("\n".join(map(str, files)))
    return answers(browser, already + len(files))[already:]


def answers(browser: webdriver.Chrome, count: int) -> list[dict[str, Any]]:
    wait(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".card > :is(ol, .wrong)")) == count)
    script = """return [...document.querySelectorAll('.card')].map((card) => ({
        path: card.querySelector('.path').textContent,
        error: card.querySelector('.wrong')?.textContent ?? '',
        abstained: card.querySelector('.abstained')?.textContent ?? '',
        classes: [...card.querySelectorAll('.name')].map((one) => one.textContent),
        shares: [...card.querySelectorAll('.share')].map((one) => one.textContent),
        probabilities: [...card.querySelectorAll('ol li')].map((one) => Number(one.dataset.probability)),
    }))"""
    return list(browser.execute_script(script))


def assert_as_predicted(
    shown: Sequence[dict[str, Any]], predictor: Predictor, files: Sequence[Path], off: float
) -> float:
    """The labels are equal and the probabilities within `off`; returns the largest difference."""
    differences = [0.0]
    assert [one["path"] for one in shown] == [file.name for file in files]
    for one, prediction in zip(shown, predictor.predict(files), strict=True):
        assert not one["error"] and one["classes"][0] == prediction.classes[0], (one, prediction)
        there = dict(zip(one["classes"], one["probabilities"], strict=True))
        common = [(there[name], p) for name, p in zip(*prediction_pairs(prediction), strict=True) if name in there]
        assert len(common) >= min(5, len(predictor.classes)) - 1  # the fifth of 1,000 may change places with the sixth
        differences += [abs(a - b) for a, b in common]
    assert max(differences) <= off
    return max(differences)


def prediction_pairs(prediction: Any) -> tuple[Sequence[str], Sequence[float]]:
    return prediction.classes, prediction.probabilities


@pytest.fixture(scope="module")
def web(bundle: Path, onnxruntime_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small export, float and int8."""
    export = tmp_path_factory.mktemp("web") / "export"
    shutil.copytree(bundle, export)
    write_web(export, onnxruntime_web)
    return export / "web"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What a browser and predict both read: JPEGs (grey, CMYK, turned), PNGs with alpha and a palette, WebP, GIF."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("a.jpg", "b.png", "c.webp", "d.gif", "tall.png")):
        write_image(folder / name, seed=number, tint=number, size=(40, 150) if number == 4 else (70, 50))
    image = Image.open(folder / "a.jpg")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.quantize(16).save(folder / "palette.png")
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    image.save(folder / "turned.jpg", exif=turned)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "alpha.png")
    return sorted(folder.iterdir())


def test_page_classifies_as_predict_does(
    browser: webdriver.Chrome, web: Path, bundle: Path, pictures: list[Path], asked_outside: list[str], tmp_path: Path
) -> None:
    """With the float and the int8 model; files that are no images say so; the number of classes can be chosen."""
    (tmp_path / "text.jpg").write_text("no image")
    with opened(browser, web) as ready:
        assert ready["threads"] == 1 and ready["error"] < 1e-4
        shown = classified(browser, pictures)
        assert_as_predicted(shown, Predictor(bundle / "model.onnx", threads=1), pictures, 1e-4)
        assert {one["classes"][0] for one in shown} == set(CLASSES)
        assert said(browser) == f"{len(pictures)} pictures classified"
        (bad,) = classified(browser, [tmp_path / "text.jpg"])
        assert "cannot decode it" in bad["error"]
        field = browser.find_element(By.ID, "top-k")
        field.send_keys(Keys.BACKSPACE, "1")
        assert [len(one["classes"]) for one in answers(browser, len(pictures) + 1)] == [1] * len(pictures) + [0]
        field.send_keys(Keys.BACKSPACE, "3")
        Select(browser.find_element(By.ID, "model")).select_by_value("model.int8.onnx")
        wait(lambda: "classified" in said(browser))
        shown = answers(browser, len(pictures) + 1)[:-1]
        for one, prediction in zip(
            shown, Predictor(bundle / "model.int8.onnx", threads=1).predict(pictures), strict=True
        ):
            assert one["probabilities"] == pytest.approx(prediction.probabilities, abs=0.1)  # of another runtime's int8
        browser.find_element(By.ID, "clear").click()
        assert browser.find_elements(By.CSS_SELECTOR, ".card") == []
    assert asked_outside == []


def test_neither_page_nor_worker_can_ask_outside(
    browser: webdriver.Chrome, web: Path, asked_outside: list[str], tmp_path: Path
) -> None:
    """Even if their code tries: the policy of the page is also that of its worker. Without it, the proxy notices."""
    folder = tmp_path / "web"
    shutil.copytree(web, folder)
    attempt = f"\ntry {{ await fetch({OUTSIDE!r}); }} catch {{ }}\n"
    for name in ("worker.js", "page.js"):
        (folder / name).write_text((folder / name).read_text() + attempt)
    with serving(functools.partial(Quiet, directory=str(folder))) as address:
        browser.get(f"{address}/index.html")
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#status[data-ready]"))
        refused = [
            entry["message"] for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]
        ]
        assert any("page.js" in line for line in refused) and any("worker.js" in line for line in refused)
        assert asked_outside == []
        page = folder / "index.html"
        page.write_text(page.read_text().replace('http-equiv="Content-Security-Policy"', ""))
        browser.get(f"{address}/index.html?")
        wait(lambda: asked_outside.count(OUTSIDE) == 2)
    asked_outside.clear()


@pytest.mark.matrix
def test_threshold_temperature_and_hostile_names(
    browser: webdriver.Chrome, web: Path, pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "web"
    shutil.copytree(web, folder)
    facts = json.loads((folder / "model.json").read_text())
    facts |= {"classes": list(HOSTILE), "thresholds": [1.0, None, 0.0], "temperature": 50.0}
    (folder / "model.json").write_text(json.dumps(facts))
    hostile = tmp_path / '"><img src=x onerror=alert(1)>.jpg'
    shutil.copy(pictures[0], hostile)
    with opened(browser, folder):
        shown = classified(browser, [*pictures, hostile])
        for one in shown:
            assert set(one["classes"]) == set(HOSTILE) and max(one["probabilities"]) < 0.6
            reasons = {HOSTILE[0]: "needs at least 100.0 %", HOSTILE[1]: "It never predicts", HOSTILE[2]: ""}
            assert reasons[one["classes"][0]] in one["abstained"] and bool(one["abstained"]) == (
                one["classes"][0] != HOSTILE[2]
            )
        assert {one["classes"][0] for one in shown} == set(HOSTILE)
        assert browser.find_elements(By.CSS_SELECTOR, "img[src='x'], main script") == []
        assert shown[-1]["path"] == hostile.name


@pytest.mark.matrix
def test_damaged_model_is_refused_by_its_self_test(browser: webdriver.Chrome, web: Path, tmp_path: Path) -> None:
    folder = tmp_path / "web"
    shutil.copytree(web, folder)
    facts = json.loads((folder / "model.json").read_text())
    facts["files"][0]["self_test"][0] += 1
    (folder / "model.json").write_text(json.dumps(facts))
    with serving(functools.partial(Quiet, directory=str(folder))) as address:
        browser.get(f"{address}/index.html")
        wait(lambda: "Error" in said(browser))
        assert "model.onnx computes wrong numbers in this browser" in said(browser)
        (folder / "model.onnx").unlink()
        browser.get(f"{address}/index.html?")
        wait(lambda: "model.onnx cannot be loaded: the server answers 404" in said(browser))


@pytest.mark.matrix
def test_graph_that_normalises_itself(
    browser: webdriver.Chrome, small_run: Path, onnxruntime_web: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """Its input is the bytes of the picture."""
    options = ["-o", str(tmp_path / "export"), "--preprocess-in-graph", "--threads", "1", "--images", "2"]
    options += ["--web", "--onnxruntime-web", str(onnxruntime_web)]
    assert main(["export", str(small_run), *options]) == 0
    assert {file.name for file in (tmp_path / "export/web").glob("*.onnx")} == {"model.onnx"}
    with opened(browser, tmp_path / "export/web"):
        shown = classified(browser, pictures)
    assert_as_predicted(shown, Predictor(tmp_path / "export/model.onnx", threads=1), pictures, 1e-4)


@pytest.fixture(scope="module")
def imagenet(shared: Path, onnxruntime_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a ResNet-18 with ImageNet weights and all of its 1,000 classes."""
    folder = tmp_path_factory.mktemp("imagenet")
    model = resnet18()
    model.load_state_dict(load_file(shared / "weights/resnet18.safetensors"))
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    classes = tuple(name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names))
    description = Description(
        architecture=Architecture.of(ModelConfig(model="resnet18"), len(classes)),
        classes=classes,
        preprocessing=Preprocessing(),
        config={},
        epoch=1,
        score={},
        weights_kind="raw",
    )
    save_best(folder / "resnet18.safetensors", model, description)
    options = ["--images", "4", "--threads", "1", "--web", "--onnxruntime-web", str(onnxruntime_web)]
    assert main(["export", str(folder / "resnet18.safetensors"), *options]) == 0
    return folder / "export"


@pytest.mark.matrix
def test_hundred_photographs(browser: webdriver.Chrome, imagenet: Path, shared: Path, asked_outside: list[str]) -> None:
    """Real JPEGs, real weights, 1,000 classes: the browser decodes and computes as predict does."""
    files = [file for file in sorted((shared / "hymenoptera/val").rglob("*.jpg")) if file.stat().st_size < 500_000][
        :100
    ]
    assert len(files) == 100
    with opened(browser, imagenet / "web"):
        shown = classified(browser, files)
    worst = assert_as_predicted(shown, Predictor(imagenet / "model.onnx"), files, 1e-3)
    print(f"100 photographs: labels equal, probabilities within {worst:.1e}")
    assert len({one["classes"][0] for one in shown}) > 10
    assert asked_outside == []


@pytest.mark.matrix
def test_threads_where_the_server_isolates_the_page(
    browser: webdriver.Chrome, web: Path, bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """Threads need two headers of the server. As many as half of the cores, at most 4; two give the same answers."""
    with opened(browser, web, Isolated) as ready:
        isolated, cores = browser.execute_script("return [crossOriginIsolated, navigator.hardwareConcurrency]")
        assert isolated is True and ready["threads"] == min(4, -(-cores // 2))
    folder = tmp_path / "web"
    shutil.copytree(web, folder)
    script = (folder / "worker.js").read_text()
    (folder / "worker.js").write_text(script.replace("ort.env.wasm", "ort.env.wasm.numThreads = 2;\n  ort.env.wasm", 1))
    with opened(browser, folder, Isolated) as ready:
        assert ready["threads"] == 2
        shown = classified(browser, pictures)
    assert_as_predicted(shown, Predictor(bundle / "model.onnx", threads=1), pictures, 1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_a_telephone(browser: webdriver.Chrome, web: Path, pictures: list[Path], scheme: str) -> None:
    """Nothing is wider than the screen; the keyboard reaches everything; colours follow the theme."""
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        with opened(browser, web):
            classified(browser, pictures[:3])
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
            ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
            reached = []
            browser.find_element(By.TAG_NAME, "body").click()
            for _ in range(4):
                ActionChains(browser).send_keys(Keys.TAB).perform()
                reached.append(browser.switch_to.active_element.get_attribute("id"))
            assert reached == ["pictures", "top-k", "model", "clear"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def made_runtime(tmp_path: Path) -> Path:
    """A folder with the names of the files of onnxruntime-web."""
    for name in RUNTIME:
        (tmp_path / "runtime" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runtime" / name).write_bytes(name.encode())
    return tmp_path / "runtime"


def test_folder_is_complete_and_is_replaced_with_the_export(bundle: Path, made_runtime: Path, tmp_path: Path) -> None:
    """A file that the user added stays; the page of an old model does not."""
    out, new = tmp_path / "export", tmp_path / "new"
    for folder in (out, new):
        folder.mkdir()
        shutil.copy(bundle / "model.onnx", folder)
    write_web(out, made_runtime)
    web = out / "web"
    assert {file.name for file in web.iterdir()} == {*PARTS, *RUNTIME.values(), MODELS[0], "model.json"}
    for source, name in RUNTIME.items():
        assert (web / name).read_bytes() == (made_runtime / source).read_bytes()
    assert (web / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()
    facts = json.loads((web / "model.json").read_text())
    assert facts["classes"] == list(CLASSES) and [file["name"] for file in facts["files"]] == ["model.onnx"]
    addresses = re.findall(r"https?://[^\s\"'`<)]+", "".join((web / name).read_text() for name in PARTS[:-1]))
    assert addresses == ["http://localhost:8000"]  # how to serve the page
    (web / "mine.txt").write_text("mine")
    put_in_place(new, out)
    assert [file.name for file in web.iterdir()] == ["mine.txt"] and (out / "model.onnx").is_file()


def test_missing_runtime_is_one_line(
    refused: Any, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, with the command that gets it."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "export"
    for given in ([], ["--onnxruntime-web", "nowhere"]):
        line = refused(2, "export", small_run, "-o", out, "--web", *given)
        assert line.count("\n") == 1 and "npm install onnxruntime-web@1.30.0" in line and not out.exists()
    assert "--onnxruntime-web needs --web" in refused(2, "export", small_run, "--onnxruntime-web", "nowhere")
