"""The page in a browser: no horizontal scrolling of the page on a phone, and colours by scheme."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.report import write_report

Raw = dict[str, Any]
# A frame has the width of a phone; the browser's own window does not get that narrow.
FRAME = """<!DOCTYPE html><body><iframe id="f" srcdoc="{page}" style="width:{width}px;height:900px">
</iframe><p id="out"></p><script>
f.onload = () => {{
  const d = f.contentDocument, w = f.contentWindow;
  const box = d.querySelector('.table');
  out.textContent = JSON.stringify({{
    page: d.documentElement.scrollWidth, view: w.innerWidth,
    box: box.scrollWidth, boxView: box.clientWidth,
    plot: d.querySelector('.plot svg').getBoundingClientRect().width,
    tick: d.querySelector('.plot svg text').getBoundingClientRect().height,
  }});
}};
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def page(shared_records: list[Raw], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    records: list[Raw] = json.loads(json.dumps(shared_records))
    for record in records:
        if record["method"] == "sft":
            record["method"] = "a_name_without_any_space_that_is_far_wider_than_a_phone_" * 3
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (write_report([path], folder / "report") / "index.html").read_text(encoding="utf-8")


def measured(browser: str, page: str, width: int, folder: Path) -> dict[str, float]:
    file = folder / "frame.html"
    file.write_text(FRAME.format(page=html.escape(page, quote=True), width=width), "utf-8")
    command = [
        browser,
        *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run".split(),
        *"--disable-background-networking --disable-component-update --disable-sync".split(),
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1200,1000",
        "--virtual-time-budget=10000",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ}
    )
    found = re.search(r'<p id="out">(\{.*?\})</p>', done.stdout)
    assert found is not None, done.stderr
    values: dict[str, float] = json.loads(html.unescape(found.group(1)))
    return values


@pytest.mark.parametrize("width", [320, 390, 820])
def test_wide_tables_scroll_in_their_own_box_and_not_the_page(
    width: int, browser: str, page: str, tmp_path: Path
) -> None:
    found = measured(browser, page, width, tmp_path)
    assert found["page"] <= found["view"] <= width
    assert found["boxView"] < found["view"]
    if width < 400:
        assert found["box"] > found["boxView"]  # there is something to scroll
    assert found["plot"] <= found["view"]
    assert found["tick"] >= 8  # figures of an axis can be read
