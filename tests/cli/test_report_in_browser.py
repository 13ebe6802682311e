"""report.html in a real browser: it opens offline, draws its pictures, writes nothing to the console, runs no name."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from tests.support.audits import audited
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.xdist_group("slot_stale")

HOSTILE = '</script><script>document.title = "run"</script><img src=x onerror=alert(1)>'
# Presses the arrow keys on every picture and leaves what the page then says in the title of the document.
_DRIVER = """<script>
addEventListener("load", () => {
  const said = [...document.querySelectorAll("svg")].map((svg) => {
    for (const key of ["ArrowRight", "ArrowRight"]) svg.dispatchEvent(new KeyboardEvent("keydown", { key }));
    return document.getElementById("tip").textContent.split("\\n")[0];
  });
  document.title = said.join(" | ");
});
</script>"""


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    raise AssertionError("no Chromium on PATH; on Debian and Ubuntu: apt-get install chromium")


def opened(page: str, folder: Path, *, width: int = 1200) -> tuple[str, str]:
    """Return the document and what went to the console, of a page with the driver in it."""
    (folder / "report.html").write_text(page.replace("</body>", f"{_DRIVER}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--window-size={width},900"),
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def stale() -> Audit:
    return audited("slot_stale").audit


def test_a_mismatch_draws_its_pictures_and_they_answer_to_keys(stale: Audit, tmp_path: Path) -> None:
    dom, console = opened(stale.to_html(), tmp_path)

    assert console == ""
    for css in ("heat", "plot", "bars", "cache"):
        assert f'<svg class="{css}"' in dom, css
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    said = title[1].split(" | ")
    assert len(said) == dom.count("<svg ")
    assert all(said), "a picture says nothing"
    assert 'class="first"' in dom
    assert "slot_stale" in dom


def test_no_name_is_run(tmp_path: Path) -> None:
    """Names of prompts come from files of other people."""
    model = tiny_model("llama", dtype=torch.float32)
    audit = kvdrift.audit(model, prompts={HOSTILE: list(range(3, 12))}, ladder="off", span=1)

    dom, console = opened(audit.to_html(), tmp_path)

    assert console == ""
    assert dom.count("<script>") == 2, "the page's own script and the driver"
    assert "<img" not in dom
    assert "&lt;img src=x" in dom


def test_what_reaches_out_or_breaks_is_seen(stale: Audit, tmp_path: Path) -> None:
    """The check above can fail: a request and an error are both on the console."""
    broken = stale.to_html().replace(
        "</main>", '<img src="http://127.0.0.1:9/x"><script>undefinedName()</script></main>'
    )

    _, console = opened(broken, tmp_path)

    assert "Content Security Policy" in console
    assert "undefinedName is not defined" in console
