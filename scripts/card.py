"""Draws nbs/images/card.png, what other sites show for a link to this one, from card.svg: most of them take no SVG."""
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"


def main():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 630})
        page.goto((IMAGES / "card.svg").as_uri())
        page.screenshot(path=IMAGES / "card.png")
        browser.close()


if __name__ == "__main__": main()
