"""The layout editor in Chromium: how long it takes, and the images of docs/editor.md.

python benchmarks/editor.py docs/editor
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5
STATE = "editor.model.state"
DRAG = """async () => {
    const shapes = document.getElementById("shapes").getBoundingClientRect();
    const at = (x, y) => ({ clientX: shapes.x + x * shapes.width, clientY: shapes.y + y * shapes.height });
    const send = (name, x, y) => document.getElementById("shapes").dispatchEvent(
        new PointerEvent(name, { ...at(x, y), pointerId: 1, bubbles: true, isPrimary: true }));
    document.getElementById("shapes").setPointerCapture = () => null;
    send("pointerdown", 0.02, 0.02);
    const times = [];
    for (let i = 0; i < 100; i++) {
        send("pointermove", 0.02 + i / 150, 0.02 + i / 200);
        times.push(await new Promise(requestAnimationFrame));
    }
    send("pointerup", 0.6, 0.5);
    return 1000 * (times.length - 1) / (times.at(-1) - times[0]);
}"""


def layout(regions: int, side: int) -> dict:
    """Boxes in rows, each over a part of the next."""
    step = side // 8
    boxes = [[step * (i % 8), step * (i // 8)] for i in range(regions)]
    boxes = [[x, y, min(x + 2 * step, side), min(y + 2 * step, side)] for x, y in boxes]
    parts = [{"prompt": f"a plain red heart {i}", "box": box} for i, box in enumerate(boxes)]
    return {"prompt": "hearts", "width": side, "height": side, "seed": 1, "regions": parts}


def opened(page: Page, address: str) -> None:
    page.goto(address)
    until(page, "document.body.dataset.ready === 'true'")
    until(page, f"!{STATE}.pending")


def until(page: Page, script: str) -> None:
    while not page.evaluate(script):
        page.wait_for_timeout(5)


def open_file(page: Page, name: str) -> None:
    page.evaluate("(name) => editor.model.open(name)", name)
    until(page, f"!{STATE}.pending")


def times(page: Page, address: str) -> dict[str, list[float]]:
    found = {"first paint, ms": [], "validation, 16 regions at 1024, ms": [], "drag, 61 regions, frames a second": []}
    found["first preview after the click, ms"] = []
    for i in range(REPEATS):
        opened(page, address)
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        found["first paint, ms"].append(page.evaluate(paint))
        open_file(page, "sixteen.yaml")
        page.evaluate(f"editor.model.put(['steps'], {20 + i}); editor.model.commit()")
        until(page, f"!{STATE}.pending")
        found["validation, 16 regions at 1024, ms"].append(page.evaluate(f"{STATE}.checkTime"))
        open_file(page, "many.yaml")
        found["drag, 61 regions, frames a second"].append(page.evaluate(DRAG))
        open_file(page, "poster.yaml")
        page.evaluate(f"editor.model.put(['seed'], {time.time_ns() % 2**32}); editor.model.commit()")
        until(page, "document.getElementById('progress').textContent === ''")
        start = time.perf_counter()
        page.keyboard.press("Control+Enter")
        until(page, "document.getElementById('picture').src.startsWith('data:image/jpeg')")
        found["first preview after the click, ms"].append(1000 * (time.perf_counter() - start))
        until(page, "document.getElementById('progress').textContent === ''")
        page.evaluate("localStorage.clear()")
    return found


def pictures(page: Page, address: str, folder: Path) -> None:
    page.evaluate("localStorage.clear()")
    opened(page, address)
    page.locator("#region-list .about").nth(1).click()
    page.wait_for_timeout(300)
    page.screenshot(path=folder / "edit.png")
    page.locator("#count").fill("4")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelectorAll('#seeds img:not([hidden])').length > 2")
    page.wait_for_timeout(600)
    page.screenshot(path=folder / "draw.png")
    until(page, "document.getElementById('progress').textContent === ''")
    page.set_viewport_size({"width": 375, "height": 812})
    page.locator("#strip .tile-open").first.click()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "small.png")


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        (Path(folder) / "poster.yaml").write_text((ROOT / "examples/poster.yaml").read_text())
        (Path(folder) / "sixteen.yaml").write_text(yaml.safe_dump(layout(16, 1024)))
        (Path(folder) / "many.yaml").write_text(yaml.safe_dump(layout(61, 1024)))
        command = [sys.executable, ROOT / "generate.py", "--edit", Path(folder, "poster.yaml")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        address = process.stdout.readline().strip()
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        for name, values in times(page, address).items():
            print(f"{name}: {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
        pictures(page, address, out)
        browser.close()
        process.terminate()


if __name__ == "__main__":
    main()
