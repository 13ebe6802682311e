"""report.html in a real browser: it opens offline, draws its pictures, writes nothing to the console, runs no name."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.report.server_page import render_server_html
from tests.support.audits import audited
from tests.support.command import ROOT
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


def opened(page: str, folder: Path, *, width: int = 1200, driver: str = _DRIVER) -> tuple[str, str]:
    """Return the document and what went to the console, of a page with the driver in it."""
    (folder / "report.html").write_text(page.replace("</body>", f"{driver}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--window-size={width},900"),
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
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


def test_a_link_to_a_producer_opens_the_table_that_is_folded_away(stale: Audit, tmp_path: Path) -> None:
    driver = """<script>addEventListener("load", () => {
      document.querySelector('#producer td a').click();
      setTimeout(() => { document.title = location.hash + " " +
        document.getElementById(location.hash.slice(1)).closest("details").open; }, 50);
    });</script>"""

    dom, console = opened(stale.to_html().replace("</main>", f"</main>{driver}"), tmp_path, driver="")

    assert console == ""
    assert "<title>#kv_aligned-2-k_rope true</title>" in dom


@pytest.mark.parametrize("kind", ["lengths", "scenarios", "foreign"])
def test_pages_of_sweeps_scenarios_and_foreign_traces_open(kind: str, tmp_path: Path) -> None:
    archive = {"lengths": "own_lengths", "scenarios": "own_scenarios", "foreign": "greta"}[kind]
    with tarfile.open(ROOT / "tests" / "golden" / "traces" / f"{archive}.tar.xz") as file:
        file.extractall(tmp_path / "run", filter="data")
    (tmp_path / "run" / "expected-report.json").unlink()
    audit, _ = judge_directory(tmp_path / "run")

    dom, console = opened(audit.to_html(), tmp_path, width=400)

    assert console == ""
    assert '<svg class="heat"' in dom
    assert ('id="lengths"' in dom) is (kind == "lengths")
    assert ('id="scenarios"' in dom) is (kind != "foreign")


def test_the_page_of_a_server_opens_and_its_names_are_text(tmp_path: Path) -> None:
    route = {
        "name": HOSTILE, "status": "FAIL", "n": 12, "typical": 0.4, "largest": 1.8, "bound": 4e-5, "ratio": 64.0,
        "p_value": None, "worst": None, "why": "beyond",
    }  # fmt: skip
    bins = [{"first": a, "last": a + 9, "n": 3, "rms": 0.1 * (a + 1), "largest": 1.0} for a in (0, 10, 20)]
    view: dict[str, object] = {
        "verdict": "MISMATCH",
        "model": HOSTILE,
        "created": "now",
        "conclusion": "H1",
        "first_failure": {"text": "p / 3"},
        "diagnosis": "late",
        "reasons": [],
        "routes": [route, {**route, "bound": float("nan")}],
        "curve": {"decode": bins},
        "recommendations": ["`kvdrift audit`"],
        "caveats": [],
        "coverage": {"n_asked": 3},
        "environment": {"command": None},
    }

    dom, console = opened(render_server_html(view), tmp_path)

    assert console == ""
    assert dom.count("<script>") == 2
    assert "&lt;img src=x" in dom
    for css in ("routes", "plot"):
        assert f'<svg class="{css}"' in dom
    assert render_server_html({**view, "routes": [], "curve": {}}).count("<svg") == 0


def test_a_page_without_a_command_has_no_error(stale: Audit, tmp_path: Path) -> None:
    page = re.sub('<div class="command">.*?</div>', "", stale.to_html(), flags=re.DOTALL)
    assert 'id="copy"' not in page

    _, console = opened(page, tmp_path)

    assert console == ""


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_a_phone_and_their_legend_stays_together(stale: Audit, width: int, tmp_path: Path) -> None:
    """Nothing but tables and pictures that scroll by themselves is wider than the page, and no swatch is alone."""
    driver = f"""<script>addEventListener("load", () => {{
      const frame = document.createElement("iframe");
      frame.width = {width}; frame.height = 800; frame.srcdoc = document.documentElement.outerHTML
        .replace(/<script>[^]*?<.script>/g, "");
      frame.onload = () => {{
        const page = frame.contentDocument;
        const apart = [...page.querySelectorAll(".key > span")].filter((entry) => {{
          const words = page.createRange(); words.selectNodeContents(entry.lastChild);
          return words.getBoundingClientRect().left < entry.querySelector("i").getBoundingClientRect().right;
        }}).length;
        const root = page.documentElement, n = page.querySelectorAll(".key > span").length;
        document.title = `${{root.scrollWidth <= root.clientWidth ? "fits" : "wider"}} ${{n}} ${{apart}}`;
      }};
      document.body.replaceChildren(frame);
    }});</script>"""

    dom, _ = opened(stale.to_html().replace("default-src 'none';", "frame-src *;"), tmp_path, driver=driver)

    assert "<title>fits 5 0</title>" in dom, re.search("<title>.*?</title>", dom)


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
