"""The page of demo.py: what it answers, to whom and to how many at once."""

import base64
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import demo
import rollout
import train_resnet_attn
import train_vit
from errors import UserError

PAGE = Path("docs/demo.md").absolute()
BROWSER = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")


@pytest.fixture
def folders(folder_flags, tmp_path):
    """Two trained ViTs of two and three layers, and a photograph, in tmp_path."""
    flags = [*folder_flags, "--epochs", "1"]
    train_vit.main([*flags, "--run-name", "two"])
    train_vit.main([*flags, "--run-name", "three", "--depth", "3"])
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    (tmp_path / "fake.jpg").write_text("no image")
    return tmp_path / "runs"


def opened(*folders):
    args = demo.demo_parser().parse_args([*map(str, folders), "--device", "cpu"])
    return {path.name: demo.ShownRun(path, args) for path in args.checkpoints}


def test_a_map_is_the_one_that_rollout_draws(folders, tmp_path):
    (run,) = opened(folders / "two").values()
    assert (run.layers, run.heads) == (2, 2)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "panel_figure", lambda shown, captions, maps: drawn.append(maps[0]))
        for method in ("rollout", "relevance"):
            seen, _ = demo.look(run, None, 3, method)
            demo.look(run, str(tmp_path / "photo.jpg"), None, method)
        demo.look(run, None, 3, "relevance", layer=2, head=1)
        demo.look(run, None, 3, layer=1)
    assert list(seen) == ["ant", "bee", "cat"] and sum(seen.values()) == pytest.approx(1)
    rollout.main([str(folders / "two"), "--index", "3", "--method", "all"])
    rollout.main([str(folders / "two"), "--image", str(tmp_path / "photo.jpg"), "--method", "all"])
    for maps, name in zip(drawn[:4], ("3", "photo", "3", "photo"), strict=True):
        ((method, one_map),) = maps.items()
        np.testing.assert_array_equal(one_map, np.load(folders / "two" / "maps" / f"{name}-{method}.npy"))
    recorder = rollout.attention_matrices(run.model, torch.zeros(1, 3, 32, 32), ["raw"])[2]
    layers = rollout.maps_of_layers(run.model, recorder, 0)
    assert layers.shape == (2, 2, 8, 8)
    assert [list(maps) for maps in drawn[4:]] == [["layer 2, head 1"], ["layer 1"]]


def test_decoded_folders_are_kept_where_cache_dir_says(folders, tmp_path):
    argv = [str(folders / "two"), "--cache-dir", str(tmp_path / "elsewhere"), "--which", "best_on_test"]
    args = demo.demo_parser().parse_args(argv)
    demo.look(demo.ShownRun(folders / "two", args), None, 0)
    assert list((tmp_path / "elsewhere").rglob("*"))


def test_the_figure_has_the_image_and_the_map(folders, tmp_path):
    (run,) = opened(folders / "two").values()
    _, figure = demo.look(run, str(tmp_path / "photo.jpg"), None)
    assert len(figure.axes) == 4 and figure.axes[0].get_title().startswith("predicted ")  # and the colour bar
    assert figure.axes[0].images[0].get_array().shape == (256, 256, 3)


def test_mistakes_are_user_errors(folders, folder_flags, tmp_path):
    (run,) = opened(folders / "two").values()
    for request, said in (
        ((str(tmp_path / "fake.jpg"), None), "fake.jpg cannot be decoded as an image"),
        ((None, 99), "99: there are 12 test images, 0 to 11"),
        ((None, 3, "rollout", 0, 1), "head 1: choose a layer"),
    ):
        with pytest.raises(UserError, match=said):
            demo.look(run, *request)
    flags = [*folder_flags[: -len(TINY)], "--epochs", "1", "--device", "cpu", "--width", "4", "--lr", "0.01"]
    train_resnet_attn.main(flags)
    with pytest.raises(UserError, match="resnet18: ResNet has no attention to record: use attribute.py"):
        opened(folders / "two", folders / "resnet18")


def test_without_gradio_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install -r requirements-demo.txt"):
        demo.main(["checkpoints/vit"])


def test_the_page_is_for_this_computer_alone(folders, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.update(options, page=page))
    demo.main([str(folders / "two"), "--device", "cpu"])
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is False
    assert not launched["page"].analytics_enabled


def test_the_cell_for_colab(folders, monkeypatch):
    gradio = pytest.importorskip("gradio")
    cell = dedent(re.search(r"(?<=    !pip install -r requirements-demo.txt\n)(?:    .*\n)+", PAGE.read_text())[0])
    opened_ports = []
    output = SimpleNamespace(serve_kernel_port_as_window=opened_ports.append)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(output=output))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: opened_ports.append(options["share"]))
    monkeypatch.chdir(folders)
    exec(cell.replace("checkpoints/vit", "two"), {})
    assert opened_ports == [False, 7860]


@pytest.fixture
def address(folders):
    """The address of the open page, with both runs."""
    pytest.importorskip("gradio")
    page = demo.make_page(opened(folders / "two", folders / "three"))
    yield page.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True)[1]
    page.close()


def test_ten_requests_at_once_and_a_file_that_is_no_image(address, tmp_path):
    client_room = pytest.importorskip("gradio_client")
    client = client_room.Client(address, verbose=False)

    def ask(photo, number, name="two", method="rollout"):
        photo = photo and client_room.handle_file(photo)
        return client.predict(name, photo, number, method, 0, 0, api_name="/look")[0]

    requests = [(None, i, ("two", "three")[i % 2], ("rollout", "relevance")[i // 2 % 2]) for i in range(10)]
    one_by_one = [ask(*request) for request in requests]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(lambda request: ask(*request), requests)) == one_by_one
    for photo, number, said in (("fake.jpg", None, "^fake.jpg cannot be decoded"), (None, 99, "^99: there are 12")):
        with pytest.raises(Exception, match=said):
            ask(photo and str(tmp_path / photo), number)
    assert ask(str(tmp_path / "photo.jpg"), None)["label"] in ("ant", "bee", "cat")


class Browser:
    """A headless Chromium, driven by the WebDriver protocol."""

    def __init__(self, folder, port=9517):
        self.base = f"http://127.0.0.1:{port}/session"
        self.driver = subprocess.Popen([BROWSER[1], f"--port={port}"], stdout=subprocess.DEVNULL)
        flags = ["headless=new", "no-sandbox", "disable-gpu", "window-size=1300,800", *QUIET, f"user-data-dir={folder}"]
        options = {"binary": BROWSER[0], "args": [f"--{flag}" for flag in flags]}
        time.sleep(2)
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.base += "/" + self.send("", wanted)["sessionId"]

    def send(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.base + path, data), timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script):
        return self.send("/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script, seconds=30):
        """What the script returns, once that is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return found

    def element(self, css):
        (found,) = self.send("/element", {"using": "css selector", "value": css}).values()
        return f"/element/{found}"

    def type_into(self, css, text):
        self.send(self.element(css) + "/value", {"text": text})

    def choose(self, label, text):
        self.send(self.element(f'input[aria-label="{label}"]') + "/click", {})
        option = f"[...document.querySelectorAll('[role=option]')].find(e => e.innerText.trim().endsWith('{text}'))"
        self.wait(f"!!{option}")
        self.run(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")

    def close(self):
        self.send("/window")
        urllib.request.urlopen(urllib.request.Request(self.base, method="DELETE"))
        self.driver.terminate()
        self.driver.wait()


@pytest.mark.slow
@pytest.mark.skipif(None in BROWSER, reason="needs chromium and chromedriver")
def test_in_a_browser(address, tmp_path):
    browser = Browser(tmp_path / "profile")
    image = "document.querySelector('[data-testid=matplotlib] img')?.src"
    try:
        browser.send("/url", {"url": address})
        browser.wait("!!document.querySelector('input[type=file]')")
        browser.type_into("input[type=file]", str(tmp_path / "photo.jpg"))
        first = browser.wait(image)
        assert browser.wait("document.body.innerText.match(/ant|bee|cat/g)?.length") >= 3
        browser.choose("layer", "2")
        browser.wait(f"{image} != {json.dumps(first)}")
        browser.choose("model", "three")
        browser.wait("document.querySelector('input[aria-label=\"layer\"]').value.startsWith('all')")
        before = browser.run(image)
        browser.choose("layer", "3")
        browser.wait(f"{image} != {json.dumps(before)}")
        (tmp_path / "page.png").write_bytes(base64.b64decode(browser.send("/screenshot")))
        assert "googleapis" not in browser.run("document.documentElement.outerHTML")
        before = browser.run(image)
        browser.type_into('input[aria-label^="or a test image"]', "5")
        browser.wait(f"{image} != {json.dumps(before)}")
        browser.type_into("input[type=file]", str(tmp_path / "fake.jpg"))
        browser.wait("document.body.innerText.includes('fake.jpg cannot be decoded as an image')")
    finally:
        browser.close()
