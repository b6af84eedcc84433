"""The layout editor in real Chromium, without a screen: drawn by mouse, by keyboard and by finger.

REQUIRE_CHROMIUM=1 turns the skip of a machine without chromium or playwright into a failure.
"""

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn
import yaml
from PIL import Image

from pipeline import Pipeline
from regional.reader import read_layout
from settings import Settings
from tools.editor import server
from tools.editor.folder import Folder
from tools.editor.queue import Queue
from tools.editor.see import Model
from tools.metadata import image_metadata, save_image

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("REQUIRE_CHROMIUM") == "1"
TOKEN = "t0ken"
SIDE = 256  # pixels of the layouts here
STATE = "editor.model.state"
BOXES = {"prompt": "hearts", "width": SIDE, "height": SIDE, "seed": 1}
BOXES |= {"regions": [{"prompt": "left", "box": [16, 16, 112, 240]}, {"prompt": "right", "box": [96, 16, 240, 240]}]}

try:
    from playwright.sync_api import Page, sync_playwright
except ImportError:
    sync_playwright = None
if not REQUIRED and (CHROMIUM is None or sync_playwright is None):
    pytest.skip("needs chromium (apt install chromium) and playwright", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The server, in a thread: its Editor, with the address."""
    folder = Folder(tmp_path_factory.mktemp("opened"))
    connection = server.listening("127.0.0.1")
    port = connection.getsockname()[1]
    queue = Queue(Pipeline, Settings())
    editor = server.Editor(folder, None, Model(Settings()), queue)
    config = uvicorn.Config(server.make_app(editor, TOKEN, port=port), log_level="critical")
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [connection]}, daemon=True)
    thread.start()
    queue.thread.start()  # loads the model while the first tests run
    editor.address = f"http://127.0.0.1:{port}/{TOKEN}/"
    yield editor
    queue.close()
    uvicorn_server.should_exit = uvicorn_server.force_exit = True
    thread.join(5)


class Shown:
    """A page with a layout, and what a user does there."""

    def __init__(self, page: "Page", editor: server.Editor, name: str):
        self.page = page
        self.editor = editor
        self.file = editor.folder.root / name
        self.problems = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append("a dialog"))
        page.on("console", self.hear)
        self.load()

    def hear(self, message) -> None:
        is_refusal = "Failed to load resource" in message.text  # as of a mistake in a layout
        if message.type == "error" and not is_refusal:
            self.problems.append(message.text)

    def load(self) -> None:
        self.page.goto(self.editor.address)
        self.until("document.body.dataset.ready === 'true'")
        self.settle()

    def until(self, script: str, seconds: float = 40):
        end = time.monotonic() + seconds
        while not (found := self.page.evaluate(script)):
            assert time.monotonic() < end, script
            self.page.wait_for_timeout(20)
        return found

    def settle(self) -> None:
        """Wait for the server's answer to the latest change."""
        self.until(f"!{STATE}.pending")
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    @property
    def layout(self) -> dict:
        return json.loads(self.page.evaluate(f"JSON.stringify({STATE}.layout)"))

    @property
    def regions(self) -> list[dict]:
        return self.layout.get("regions", [])

    @property
    def selected(self) -> list[int]:
        return self.page.evaluate(f"{STATE}.selected")

    def saved(self) -> dict:
        self.page.keyboard.press("Control+s")
        self.until("!editor.model.isDirty()")
        return yaml.safe_load(self.file.read_text(encoding="utf-8"))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The screen's pixel of one of the image."""
        box = self.page.locator("#shapes").bounding_box()
        return box["x"] + x * box["width"] / SIDE, box["y"] + y * box["height"] / SIDE

    def drag(self, *points: tuple[float, float], keys: tuple[str, ...] = ()) -> None:
        for key in keys:
            self.page.keyboard.down(key)
        self.page.mouse.move(*self.place(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.place(*point), steps=3)
        self.page.mouse.up()
        for key in keys:
            self.page.keyboard.up(key)

    def click(self, x: float, y: float, *keys: str) -> None:
        self.drag((x, y), keys=keys)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def field(self, key: str):
        return self.page.locator(f'[data-key="{key}"]').locator("input, textarea, select").first

    def said(self, key: str) -> str:
        return self.page.locator(f'[data-key="{key}"] > .said').inner_text()


@pytest.fixture
def shown(browser, running, request):
    """Opens a layout in a page of this size; checks that the page had no errors of its own."""
    contexts = []

    def show(layout: dict | None = None, size: tuple[int, int] = (1280, 800), **how) -> Shown:
        name = f"{request.node.name.split('[')[0][:40]}_{len(contexts)}.yaml"
        if layout is not None:
            (running.folder.root / name).write_text(yaml.safe_dump(layout, sort_keys=False))
        running.file = name
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce", **how)
        found = Shown(context.new_page(), running, name)
        contexts.append((context, found))
        return found

    yield show
    for context, found in contexts:
        context.close()
        assert not found.problems


# ---------------------------------------------------------------- drawing


def test_shapes_drawn_by_mouse_are_in_the_file(shown):
    page = shown(BOXES | {"regions": []})
    page.press("b")
    page.drag((3, 5), (60, 70), (99, 90))
    page.press("e")
    page.drag((130, 10), (250, 100))
    page.press("p")
    for point in (20, 120), (100, 120), (60, 200), (21, 121):
        page.click(*point)
    page.press("f")
    page.drag((140, 140), (200, 130), (240, 180), (180, 240), (140, 200), (140, 150))
    names = ["a box", "an ellipse", "a triangle", "freehand"]
    for i, name in enumerate(names):
        page.field(f"regions[{i}].prompt").fill(name)
    regions = page.saved()["regions"]
    assert [region["prompt"] for region in regions] == names
    assert regions[0]["box"] == [0, 0, 96, 96]
    assert regions[1]["ellipse"] == [128, 16, 256, 96]
    assert regions[2]["polygon"] == [[16, 128], [96, 128], [64, 208]]
    freehand = regions[3]["polygon"]
    assert 4 < len(freehand) < 12 and all(abs(a - b) < 3 for a, b in zip(freehand[0], (140, 140)))


def test_regions_are_selected_moved_resized_copied_and_deleted(shown):
    page = shown(BOXES)
    page.click(104, 100)  # in both: the upper one
    assert page.selected == [1]
    page.click(104, 100, "Alt")
    assert page.selected == [0]
    page.click(104, 100, "Alt")
    assert page.selected == [1]
    page.click(30, 100, "Shift")
    assert page.selected == [1, 0]
    page.press("Escape")
    page.drag((2, 2), (120, 60), keys=("Shift",))
    assert page.selected == [0, 1]
    page.drag((60, 100), (60, 82))  # both move, snapped, and stay in the image
    assert [region["box"] for region in page.regions] == [[16, 0, 112, 224], [96, 0, 240, 224]]
    page.click(200, 100)
    page.drag((240, 224), (201, 180))
    assert page.regions[1]["box"] == [96, 0, 208, 176]
    page.press("b")
    page.drag((118, 33), (160, 64), keys=("Control",))  # over another
    assert page.regions[2]["box"] == [112, 32, 160, 64]
    page.press("Control+d", "Delete")
    assert len(page.regions) == 3
    page.press("Control+z", "Control+Shift+z", "Control+z", "ArrowRight", "Alt+ArrowDown", "Shift+ArrowDown")
    assert len(page.regions) == 4
    assert page.regions[3]["box"] == [128, 33, 176, 81]


def test_numbers_percentages_and_the_order_of_the_list(shown):
    page = shown(BOXES)
    page.click(30, 100)
    edges = page.page.locator('[data-key="regions[0].box"] input')
    edges.nth(2).fill("50%")
    assert page.regions[0]["box"] == [16, 16, "50%", 240]
    page.page.get_by_role("button", name="Move region 0 down").click()
    assert [region["prompt"] for region in page.regions] == ["right", "left"]
    page.page.get_by_role("button", name="Hide region 0").click()
    page.press("Escape")
    page.click(200, 100)
    assert page.selected == []
    page.page.get_by_role("button", name="Lock region 1").click()
    page.drag((30, 100), (90, 200))
    assert page.regions[1]["box"] == [16, 16, "50%", 240]
    page.page.get_by_role("button", name="Unlock region 1").click()
    page.drag((30, 100), (46, 100))
    assert page.regions[1]["box"] == [32, 16, "56.25%", 240]


def test_large_seeds_and_what_the_page_does_not_know_are_kept(shown):
    page = shown(BOXES | {"seed": 2**63 - 1, "someday": {"a": [1.5, None]}})
    page.click(30, 100)
    page.press("ArrowRight")
    saved = page.saved()
    assert saved["seed"] == 2**63 - 1 and saved["someday"] == {"a": [1.5, None]}
    assert saved["regions"][0]["box"] == [32, 16, 128, 240]
    page.page.get_by_role("tab", name="Layout").click()
    assert page.field("seed").input_value() == str(2**63 - 1)


def test_undo_and_redo_of_200_random_actions_return_to_the_start(shown):
    page = shown(BOXES)
    start = page.layout
    draw = random.Random(4)
    script = """(actions) => {
        const { state, add, put, commit, reorder, removeSelected, mark, regions } = editor.model;
        const run = [
            (a) => (add({ box: [a, a, a + 32, a + 48], prompt: `new ${a}` }), commit()),
            (a, i) => (state.selected = [i], removeSelected()),
            (a, i) => regions()[i] && (put(["regions", i, "strength"], a / 10), commit()),
            (a, i) => regions()[i] && (put(["regions", i, "prompt"], `p ${a}`), commit(`p ${a}`)),
            (a, i) => reorder(i, a % 2 ? 1 : -1),
            (a, i) => regions()[i] && mark(i, a % 2 ? "hidden" : "locked"),
            (a) => (put(["steps"], a + 1), commit()),
            (a) => (put(["style"], undefined), put(["loras"], [{ file: `f${a}` }]), commit()),
        ];
        let changes = 0;
        for (const [kind, a, i] of actions) {
            const before = editor.model.history().past;
            run[kind](a, i % Math.max(regions().length, 1));
            changes += editor.model.history().past - before;
        }
        return changes;
    }"""
    actions = [[draw.randrange(8), draw.randrange(200), draw.randrange(60)] for _ in range(200)]
    changes = page.page.evaluate(script, actions)
    end = page.layout
    assert changes > 150 and end != start
    page.press("Escape", *["Control+z"] * 3)
    page.page.evaluate("(count) => { for (; count; count--) editor.model.undo(); }", changes - 3)
    assert page.layout == start
    page.settle()
    assert page.page.locator("#undo").is_disabled()
    page.press(*["Control+Shift+z"] * 3)
    page.page.evaluate("(count) => { for (; count; count--) editor.model.redo(); }", changes - 3)
    assert page.layout == end


def test_a_brush_paints_a_mask_that_the_program_reads(shown, running):
    page = shown(BOXES | {"regions": []})
    page.press("m")
    page.drag((40, 128), (200, 128))
    page.until(f"{STATE}.layout.regions?.length === 1")
    first = page.regions[0]["mask"]
    page.settle()
    page.drag((128, 40), (128, 200))
    page.until(f"{STATE}.layout.regions[0].mask !== '{first}'")
    page.press("x")
    page.page.evaluate(f"{STATE}.brush = 32")
    second = page.regions[0]["mask"]
    page.drag((40, 128), (80, 128))
    page.until(f"{STATE}.layout.regions[0].mask !== '{second}'")
    page.field("regions[0].prompt").fill("a cross")
    page.settle()
    name = page.saved()["regions"][0]["mask"]
    with Image.open(running.folder.root / name) as mask:
        assert mask.size == (SIDE, SIDE)
        light = [mask.convert("L").getpixel(at) > 127 for at in ((200, 128), (128, 60), (60, 128), (20, 20))]
    assert light == [True, True, False, False]
    assert not (running.folder.root / first).exists()
    page.press("Escape", "Control+z", "Control+z")  # back to a mask that is no longer in the folder
    page.settle()
    assert page.page.evaluate(f"{STATE}.errors.map((each) => each.key)") in ([], ["regions[0].prompt"])


def test_61_regions_and_not_one_more(shown):
    regions = [{"prompt": f"region {i}", "box": [4 * i, 0, 4 * i + 16, 256]} for i in range(60)]
    page = shown(BOXES | {"regions": regions})
    page.press("v")
    page.drag((0, 255), (254, 200), keys=("Shift",))
    page.page.get_by_role("button", name="Add a region").click()
    assert len(page.regions) == 61
    page.press("Escape", "b")
    page.drag((16, 16), (64, 64), keys=("Control",))
    assert len(page.regions) == 61
    assert "at most 61" in page.page.locator(".toast").first.inner_text()
    page.settle()
    colors = page.page.evaluate(f"new Set({STATE}.marks.map((mark) => mark.color)).size")
    assert colors == 61


# ---------------------------------------------------------------- fields


def test_a_mistake_is_said_at_its_field_while_typing(shown):
    page = shown(BOXES)
    page.click(30, 100)
    page.field("regions[0].strength").fill("abc")
    page.settle()
    assert page.said("regions[0].strength") == (
        "regions[0].strength = 'abc': expected float, got str (attention weight of its prompt; published: 1)."
    )
    assert page.page.locator("#problem-count").inner_text() == "1 mistake"
    page.field("regions[0].strength").fill("2")
    page.settle()
    assert page.said("regions[0].strength") == "" and page.regions[0]["strength"] == 2
    page.page.get_by_role("tab", name="Layout").click()
    page.field("width").fill("250")
    page.settle()
    assert "not a multiple of 16, the nearest are 240 and 256" in page.said("width")
    page.press("Control+z")
    page.settle()
    assert page.said("width") == ""


def test_every_key_of_the_schema_has_a_field(shown, running):
    page = shown(BOXES | {"image": {"file": "x.png"}, "loras": [{"file": "y"}]})
    page.click(30, 100)
    page.settle()
    keys = page.page.evaluate("[...document.querySelectorAll('[data-key]')].map((node) => node.dataset.key)")
    schema = running.start()["schema"]
    whole = schema["properties"].keys() - {"regions"}
    region = schema["$defs"]["Region"]["properties"].keys() - {"ellipse", "polygon", "mask", "color"}
    expected = {*whole, *(f"regions[0].{key}" for key in region), "image.file", "image.repaint", "loras[0].scale"}
    assert expected <= {*keys}


def test_what_a_text_says_never_runs(shown):
    evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'"`${1}'
    page = shown(BOXES | {"prompt": evil, "style": evil, "regions": [{"prompt": evil, "box": [0, 0, 256, 256]}]})
    page.click(30, 100)
    page.field("regions[0].feather").fill(evil)
    page.settle()
    assert evil[:20] in page.said("regions[0].feather")
    assert page.page.evaluate("window.hacked") is None
    assert page.page.locator("aside img, aside script, #stage script").count() == 0
    assert page.regions[0]["prompt"] == evil


# ---------------------------------------------------------------- keyboard, size, access


def test_a_layout_is_made_and_saved_by_keyboard_alone(shown):
    page = shown(BOXES | {"regions": []})
    page.page.locator("#stage").focus()
    page.press("b", *["ArrowLeft"] * 4, *["ArrowUp"] * 4, "Enter", *["ArrowRight"] * 3, *["ArrowDown"] * 2, "Enter")
    assert page.regions[0]["box"] == [64, 64, 112, 96]
    page.press("Enter")
    page.page.keyboard.type("a small box")
    page.press("Escape", "Escape", "p", "Enter", *["ArrowRight"] * 3, "Enter", *["ArrowDown"] * 3)
    page.press("Enter", "Shift+Enter")
    assert len(page.regions[1]["polygon"]) >= 3
    page.press(".", ".", "Enter")
    page.page.keyboard.type("corner")
    page.press("Escape", "[", "h", "l")
    regions = page.saved()["regions"]
    assert sorted(region["prompt"] for region in regions) == ["a small box", "corner"]
    page.press("?")
    assert page.page.locator("#keys").get_by_text("Cycle through the regions").is_visible()


def test_a_window_of_375_pixels(shown):
    page = shown(BOXES, size=(375, 740), has_touch=True)
    for tab in ("Layout", "Image", "Regions"):
        page.page.get_by_role("tab", name=tab).click()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 375
    page.page.evaluate("scrollTo(0, 0)")
    page.page.touchscreen.tap(*page.place(40, 100))
    assert page.selected == [0]
    small = """[...document.querySelectorAll("#tools button, header button")].filter((node) => node.offsetHeight
        && node.offsetHeight < 28).length"""
    assert page.page.evaluate(small) == 0
    page.press("e")
    page.drag((10, 245), (100, 252), keys=("Control",))
    assert page.regions[2]["ellipse"][0] == 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_and_contrast_by_axe(shown, scheme):
    page = shown(BOXES | {"width": 250, "loras": [{"file": "x"}]}, color_scheme=scheme)
    page.click(30, 100)
    page.settle()
    page.page.evaluate((ROOT / "tests/vendor/axe-core/axe.min.js").read_text(encoding="utf-8"))
    for tab in ("Regions", "Layout", "Image"):
        page.page.get_by_role("tab", name=tab).click()
        found = page.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        wrong = {each["id"]: [node["html"][:200] for node in each["nodes"]][:3] for each in found}
        assert not wrong, json.dumps(wrong, indent=1)


# ---------------------------------------------------------------- drafts and images


def test_what_is_not_saved_survives_a_reload(shown):
    page = shown(BOXES)
    before = page.file.read_bytes()
    page.press("b")
    page.drag((20, 20), (90, 90), keys=("Control",))
    page.load()
    assert len(page.regions) == 3 and page.file.read_bytes() == before
    page.page.get_by_role("button", name="Discard").click()
    assert len(page.regions) == 2
    page.load()
    assert len(page.regions) == 2 and page.page.locator(".toast").count() == 0


def test_a_file_that_changed_is_not_replaced_unasked(shown):
    page = shown(BOXES)
    page.file.write_text("# mine\n" + page.file.read_text())
    page.click(30, 100)
    page.press("ArrowDown", "Control+s")
    page.page.get_by_role("button", name="Save all the same").click()
    page.until("!editor.model.isDirty()")
    text = page.file.read_text()
    assert text.startswith("# mine\n") and yaml.safe_load(text)["regions"][0]["box"][1] == 32


def test_images_are_drawn_watched_cancelled_and_found_after_a_reload(shown, running):
    page = shown(BOXES | {"steps": 400})
    page.press("Control+Enter")
    page.until("/step [1-9]/.test(document.getElementById('progress').textContent)", 90)
    page.until("document.querySelector('#picture').src.startsWith('data:image/jpeg')")
    page.load()
    page.until("/step \\d+ of 400 · .* s left/.test(document.getElementById('progress').textContent)")
    page.page.locator(".tile.running .stop").click()
    page.until("document.querySelector('.tile.cancelled')")
    page.page.get_by_role("tab", name="Layout").click()
    page.field("steps").fill("2")
    page.page.locator("#count").fill("2")
    page.page.locator("#want-maps").check()
    page.press("Control+Enter")
    page.until("document.querySelectorAll('#seeds button').length === 2")
    page.until("document.querySelectorAll('.tile.done').length === 2")
    names = sorted(path.name for path in running.folder.root.glob(f"{page.file.stem}*.png"))
    assert names == [f"{page.file.stem}_seed{i}.png" for i in (1, 2)]
    page.page.locator("#seeds button").first.click()
    page.page.get_by_role("button", name="Attention of the region").click()
    page.until("!document.getElementById('heat').hidden")


def test_a_result_gives_its_layout_back_is_compared_and_repainted(shown, running):
    page = shown(BOXES)
    made = Pipeline()
    for seed in (1, 2):
        layout = read_layout(None, BOXES | {"steps": 3 + seed}, SIDE)
        metadata = image_metadata(layout, seed, made, "x.yaml")
        image = Image.new("RGB", (SIDE, SIDE), ("red", "blue")[seed - 1])
        save_image(image, metadata, running.folder.root / f"result{seed}.png")
    page.load()
    page.page.get_by_role("button", name="result2.png").click()
    page.until("document.querySelector('.settings dd')?.textContent === '2'")
    page.page.get_by_label("Compare with").select_option(label="result1.png")
    page.page.locator("#compare-at").fill("25")
    assert page.page.evaluate("document.getElementById('compare').style.clipPath").startswith("inset(0")
    page.page.get_by_role("button", name="Use its layout").click()
    page.until(f"{STATE}.layout.steps === 5")
    asked = []
    page.page.route(
        "**/api/generate", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json={"jobs": []}))
    )
    page.click(30, 100)
    page.page.get_by_role("button", name="Repaint this region only").click()
    end = time.monotonic() + 10
    while not asked and time.monotonic() < end:
        page.page.wait_for_timeout(20)
    assert asked[0]["layout"]["image"] == {"file": "result2.png", "repaint": {"regions": [0]}}
    assert "image" not in page.layout
