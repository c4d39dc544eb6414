"""What tests in a real browser share: how a page is looked at, and how well its text stands out."""

from __future__ import annotations

from typing import Any


def look_at(browser: Any, size: tuple[int, int, bool], *, dark: bool = False, medium: str = "") -> None:
    """From now on the browser has a window of ``size``: width and height in CSS pixels, and whether it is a phone."""
    width, height, mobile = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": [scheme]})


CONTRAST = """
const parse = c => c.match(/[\\d.]+/g).map(Number);
const linear = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.map(linear); return .2126 * r + .7152 * g + .0722 * b; };
const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
                      if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
return [...document.body.querySelectorAll('*')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.tagName !== 'title')
  .map(e => { const s = getComputedStyle(e), c = parse(e.namespaceURI.endsWith('svg') ? s.fill : s.color).slice(0, 3);
              const [a, b] = [light(c), light(ground(e))].sort((x, y) => y - x);
              return [(a + .05) / (b + .05), e.tagName + ': ' + e.textContent.trim().slice(0, 40)]; });
"""
"""A script that returns the contrast of every element with text, as ``[ratio, element]``."""
