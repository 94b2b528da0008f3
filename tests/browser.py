"""A real browser, headless: what a page looks like once it is drawn, and what the browser complains of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_TIMEOUT = 60.0
_CONSOLE = re.compile(r":CONSOLE(?::\d+|\(\d+\))\] *(.*)")
# Runs when the page and all it names are loaded, and writes what it finds at the end of the page.
_PROBE = """
<script>
addEventListener("load", () => {
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const found = {
  page: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
  card: getComputedStyle(document.querySelector("section")).backgroundColor,
  width: [document.documentElement.scrollWidth, window.innerWidth],
  text: document.body.innerText,
  loaded: performance.getEntriesByType("resource").map(r => r.name),
  plots: [...document.querySelectorAll("svg")].map(svg => ({
    title: svg.getAttribute("aria-label"),
    box: box(svg),
    shapes: [...svg.querySelectorAll("path, rect, line, circle")].map(e =>
      [e.getAttribute("class"), ...box(e)]),
    texts: [...svg.querySelectorAll("text")].map(e =>
      [e.textContent, getComputedStyle(e).fill, ...box(e)]),
  })),
};
const result = document.createElement("script");
result.type = "application/json"; result.id = "probe"; result.textContent = JSON.stringify(found);
document.body.append(result);
});
</script>
"""


def find_browser() -> str | None:
    """Path of a browser of Chromium's family, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(find_browser() is None, reason=f"no browser here: {', '.join(_NAMES)}")


@dataclass(frozen=True)
class Drawn:
    """A page as the browser drew it.

    Attributes:
        found: What the probe saw.
        console: What stood on the browser's console.
        image: The screenshot, PNG.
    """

    found: dict[str, Any]
    console: list[str]
    image: Path


def draw(page: str, folder: Path, *, dark: bool = False, width: int = 1100, height: int = 3000) -> Drawn:
    """Open a page without any network.

    Args:
        page: HTML.
        folder: For the page, the screenshot and the browser's profile.
        dark: Whether the reader prefers dark colours.
        width, height: Of the window, in pixels.
    """
    browser = find_browser()
    assert browser is not None
    file, image = folder / "page.html", folder / "page.png"
    file.write_text(page.replace("</body>", _PROBE + "</body>"), "utf-8")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *(
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--window-size={width},{height}",
        ),
        *(
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ),
        *("--dump-dom", f"--screenshot={image}", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    probed = re.search(r'<script type="application/json" id="probe">(.*?)</script>', done.stdout, re.DOTALL)
    assert probed is not None, f"the probe did not run: {done.stderr[-2000:]}"
    return Drawn(json.loads(probed[1]), _CONSOLE.findall(done.stderr), image)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours such as "rgb(1, 2, 3)", 1 to 21, as WCAG 2 defines it."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
