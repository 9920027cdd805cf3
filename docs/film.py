"""Makes docs/page.png and docs/learn.webp, from the page of a finished quickstart in a browser.

    make quickstart
    pip install playwright
    python docs/film.py

CHROMIUM and CHROMIUM_ARGS are those of tests/test_page.py.
"""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
SIZE = dict(width=900, height=880)  # pixels: the page fits, so that it never scrolls
FRAME = 400  # milliseconds between two pictures of the film
LAST_FRAME = 4000  # how long the last one stays


def start_page() -> tuple[subprocess.Popen, str]:
    """sample.py --web, and the address that it prints."""
    command = [sys.executable, "-u", "sample.py", "--model", "out/quickstart", "--web"]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def take_picture(page, clip: dict | None = None) -> Image.Image:
    options = {} if clip is None else dict(clip=clip)
    return Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")


def open_page(browser, address: str):
    page = browser.new_page(viewport=SIZE)
    page.goto(address)
    page.wait_for_function("() => shown?.isDone && !running")
    page.wait_for_timeout(1000)  # the prompt is read
    return page


def draw_page(page) -> None:
    """The page while a person points at a token."""
    page.locator(".token:not(.prompt)").nth(24).hover()
    page.wait_for_selector("#out.looking")
    page.wait_for_timeout(500)
    picture = take_picture(page).quantize(128)
    picture.save(DOCS / "page.png", optimize=True)


def make_film(page) -> None:
    """Watch it learn, from the first checkpoint to the last: the curve and the text."""
    page.mouse.move(0, 0)
    page.locator("#watch").click()
    top = page.locator("#learning").bounding_box()
    clip = dict(x=0, y=top["y"] - 8, width=top["x"] + top["width"] + 16)
    clip["height"] = 450
    frames = []
    while page.evaluate("() => film !== null"):
        frames.append(take_picture(page, clip))
        page.wait_for_timeout(FRAME)
    frames.append(take_picture(page, clip))
    lengths = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    frames[0].save(
        DOCS / "learn.webp",
        save_all=True,
        append_images=frames[1:],
        duration=lengths,
        loop=0,
        quality=60,
        method=6,
    )


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
    arguments = ["--no-sandbox", *os.environ.get("CHROMIUM_ARGS", "").split()]
    process, address = start_page()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
            page = open_page(browser, address)
            draw_page(page)
            make_film(page)
            browser.close()
    finally:
        process.terminate()
    for name in ("page.png", "learn.webp"):
        print(f"docs/{name}: {(DOCS / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
