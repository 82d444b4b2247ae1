"""Pages as a browser lays them out: headless Chromium measures each in frames of several widths, light and dark.

All frames are in one document that one Chromium loads. Its own window cannot be as narrow as a phone, but a frame can,
and takes light or dark from the ``color-scheme`` of its element. The measurements are read from the printed DOM.
"""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PHONE, DESKTOP = 320, 1280  # CSS pixels
SECONDS = 60

_MEASURE = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = channels(color).slice(0, 3).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {  // WCAG 2.2, relative luminance
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
};
const measure = (frame) => {
  const view = frame.contentWindow, page = frame.contentDocument, style = (e) => view.getComputedStyle(e);
  const ground = (e) => {
    while (e && /rgba\\(.*, 0\\)/.test(style(e).backgroundColor)) e = e.parentElement;
    return e ? style(e).backgroundColor : "rgb(255, 255, 255)";
  };
  const named = (e) => `<${e.tagName.toLowerCase()}> ${e.textContent.trim().slice(0, 40)}`;
  const all = [...page.body.querySelectorAll("*")], scrolled = [...page.querySelectorAll(".table, pre")];
  const text = all.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const outside = all.filter((e) => !scrolled.some((s) => s !== e && s.contains(e)))
    .filter((e) => e.getBoundingClientRect().right > view.innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5);
  const lines = (e) => {
    const range = page.createRange();
    range.selectNodeContents(e.firstChild || e);
    return new Set([...range.getClientRects()].map((r) => r.top)).size;
  };
  const broken = [...page.querySelectorAll("td, b")].filter((e) => e.textContent.length <= 10 && lines(e) > 1);
  const pale = text.map((e) => [contrast(style(e).color, ground(e)), named(e)]).sort((a, b) => a[0] - b[0])[0];
  const tables = [...page.querySelectorAll(".table")].map((box) => {
    const heads = [...box.querySelectorAll("thead th")].map((e) => e.textContent.trim());
    const rows = [...box.querySelectorAll("tbody tr")], wide = box.scrollWidth > box.clientWidth;
    box.scrollLeft = box.scrollWidth;
    const label = rows[0].children[0].getBoundingClientRect(), last = rows[0].lastElementChild.getBoundingClientRect();
    box.scrollLeft = 0;
    return {heads, cells: [...new Set(rows.map((e) => e.children.length))], wide,
            label: [label.left, label.right], last: [last.left, last.right]};
  });
  return {
    width: view.innerWidth, document: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
    outside: outside.map(named), broken: broken.map(named), contrast: pale[0], palest: pale[1],
    ground: luminance(style(page.body).backgroundColor),
    smallest: Math.min(...text.map((e) => parseFloat(style(e).fontSize))), tables,
    code: [...page.querySelectorAll("code, pre")].filter((e) => !/mono/.test(style(e).fontFamily)).map(named),
  };
};
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map((frame) => [frame.title, measure(frame)]);
  document.body.textContent = `MEASURED${JSON.stringify(Object.fromEntries(measured))}MEASURED`;
});
"""


def frames(pages: Mapping[str, str]) -> str:
    """Every page at both widths, light and dark, in one document; ``title`` is "name width scheme"."""
    parts = [
        f'<iframe title="{name} {width} {scheme}" style="width: {width}px; height: 600px; border: 0; '
        f'color-scheme: {scheme}" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (PHONE, DESKTOP)
        for scheme in ("light", "dark")
    ]
    return f'<!DOCTYPE html>\n<meta charset="utf-8">\n<body>{"".join(parts)}</body>\n'


def measured(pages: Mapping[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    """What Chromium measures, by "name width scheme"."""
    assert CHROMIUM is not None
    document = folder / "frames.html"
    document.write_text(f"{frames(pages)}<script>{_MEASURE}</script>", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", document.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    found = re.search("MEASURED(.*)MEASURED", done.stdout, re.DOTALL)
    assert found is not None, f"nothing was measured: {done.stdout[-500:]} {done.stderr[-500:]}"
    return json.loads(html.unescape(found[1]))
