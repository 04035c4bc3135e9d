"""The HTML page in a real browser: how long until it answers a key, and the pictures of it in docs/.

    python benchmarks/page.py                    # writes benchmarks/results/page.json, then docs/page.png
    python benchmarks/page.py --draw-only        # docs/page.png from what is there
    python benchmarks/page.py --screenshots RUN  # docs/report.png and docs/report_390.png of a run's page

The page is that of a 32-layer step: Llama 2 7B with LoRA, 1 x 2,048 tokens, traced without weights, 16 budgets. Timed
from the navigation's start, in the page's own clock: the document is there; drawn and ready for a key; then, for every
budget of the slider, from the key to the next frame. Each load is in a tab of its own.

Chromium is driven over two pipes (the DevTools protocol), so no other package and no port is needed; the tests of the
page use the same driver. Drawing needs matplotlib.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "page.json"
LOADS = 7
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: The protocol speaks over the descriptors 3 and 4, which Python cannot give to a child by number.
_AS_3_AND_4 = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Page:
    """One tab. `said` is what went to the console, `requests` every address that was asked for but the page's own."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.said: list[str] = []
        self.requests: list[str] = []

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call `method` of the protocol. Raises `RuntimeError` with the browser's own words."""
        return self._browser.call(method, parameters, self._session)

    def heard(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if address != self.address and not address.startswith(("data:", "blob:")):
                self.requests.append(address)

    def open(self, file: Path, *, width: int = 1280, height: int = 900, scheme: str = "light", script: bool = True,
             media: str = "") -> None:  # fmt: skip
        """Load `file` and wait until it is there, in a window of `width` x `height` CSS pixels."""
        self.said.clear()
        self.requests.clear()
        self.address = file.resolve().as_uri()
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")
        self("Emulation.setScriptExecutionDisabled", value=not script)
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        loaded = self._browser.expect(self._session, "Page.loadEventFired")
        self("Page.navigate", url=self.address)
        self._browser.until(loaded)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression!r}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, as from the keyboard."""
        text = {"Enter": "\r", "Tab": "", " ": " "}.get(key, key if len(key) == 1 else "")
        code = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
                "ArrowRight": 39, "ArrowDown": 40}.get(key, 0)  # fmt: skip
        same = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **same)
        self("Input.dispatchKeyEvent", type="keyUp", **same)

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """The mouse goes to a place in the window."""
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])

    def paper(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self("Page.printToPDF", printBackground=False)["data"])


class Browser:
    """A headless Chromium with a profile of its own, ended with the `with` block of `browser()`."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._numbers = itertools.count(1)
        self._pending = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._awaited: dict[tuple[str, str], int] = {}
        self._pages: dict[str, Page] = {}

    def page(self) -> Page:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        return page

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while number not in self._answers:
            self._hear()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        found: dict[str, Any] = answer["result"]
        return found

    def expect(self, session: str, method: str) -> tuple[tuple[str, str], int]:
        key = (session, method)
        return key, self._awaited.setdefault(key, 0)

    def until(self, expected: tuple[tuple[str, str], int]) -> None:
        key, count = expected
        while self._awaited[key] == count:
            self._hear()

    def _hear(self) -> None:
        while b"\0" not in self._pending:
            piece = os.read(self._reads, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._pending += piece
        line, self._pending = self._pending.split(b"\0", 1)
        message = json.loads(line)
        if "id" in message:
            self._answers[message["id"]] = message
            return
        session, method = message.get("sessionId", ""), message["method"]
        if (session, method) in self._awaited:
            self._awaited[session, method] += 1
        if session in self._pages:
            self._pages[session].heard(method, message["params"])


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium. Raises `RuntimeError` where there is none."""
    if CHROMIUM is None:
        raise RuntimeError("there is no Chromium on this machine: apt install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        (hears, to_it), (from_it, says) = os.pipe(), os.pipe()
        # the wrapper script of Debian's package has children of its own: the group is ended as one
        process = subprocess.Popen(
            [sys.executable, "-c", _AS_3_AND_4, str(hears), str(says), CHROMIUM, "--headless=new", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
             "--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"],
            pass_fds=(hears, says), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": folder}, start_new_session=True,
        )  # fmt: skip
        os.close(hears)
        os.close(says)
        try:
            yield Browser(from_it, to_it)
        finally:
            os.close(to_it)
            os.close(from_it)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


# --------------------------------------------------------------------------------------- time to interactive

MODEL, METHOD, SEQ, BUDGET = "llama-2-7b", "lora", 2048, "60%"
#: Every place of the slider: milliseconds from the input to the frame after it.
_KEYS = """(async () => {
  const slider = document.getElementById("budget"), found = [];
  const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  for (let i = 0; i <= Number(slider.max); i++) {
    await frame(); const start = performance.now();
    slider.value = i; slider.dispatchEvent(new Event("input")); await frame(); found.push(performance.now() - start);
  }
  return found; })()"""


def document_of_32_layers() -> dict[str, Any]:
    """The data of the page of a 32-layer step, from a trace without weights."""
    import tightfit
    from tightfit.catalog import gpu
    from tightfit.forecast import Setup, trace_for
    from tightfit.report import plan_document, study

    trace = trace_for(Setup(model=MODEL, method=METHOD, batch=1, seq=SEQ), gpu("h100-sxm"))
    plan = tightfit.plan(trace, BUDGET)
    return plan_document(plan, MODEL, study(trace, plan))


def record() -> dict[str, Any]:
    from tightfit.report import page as page_of
    from tightfit.step.environment import environment

    load = os.getloadavg()[0]
    text = page_of(document_of_32_layers())
    rows = []
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        file = Path(folder) / "page.html"
        file.write_text(text, encoding="utf-8")
        for width in (1280, 390):
            for _ in range(LOADS):
                tab = chromium.page()
                tab.open(file, width=width)
                parsed, ready = tab.ask(
                    "[performance.timing.domInteractive - performance.timing.navigationStart,"
                    " performance.getEntriesByName('ready')[0].startTime]"
                )
                rows.append({"width": width, "parsed_ms": parsed, "ready_ms": ready, "key_ms": tab.ask(_KEYS)})
        version = chromium.call("Browser.getVersion", {})["product"]
    return {
        "model": MODEL, "method": METHOD, "seq": SEQ, "budget": BUDGET, "page_bytes": len(text.encode()),
        "browser": version, "load_average_at_start": load, "loads": rows, "environment": environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def draw() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    names = []
    for width in (390, 1280):
        mine = [row for row in found["loads"] if row["width"] == width]
        for name, values in (
            ("from the slider to the next frame", [ms for row in mine for ms in row["key_ms"]]),
            ("drawn and ready", [row["ready_ms"] for row in mine]),
        ):
            axes.plot(values, [len(names)] * len(values), "o", ms=4, alpha=0.6, color="#2f6fb3")
            names.append(f"{name}, {width} px")
    axes.axvline(2000, color="#a1121f", lw=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds (the line: two seconds)", fontsize=8)
    axes.set_title(
        f"The page of a 32-layer step, {found['page_bytes'] / 1e6:.2f} MB, in {found['browser']}",
        fontsize=9,
        loc="left",
    )
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(ROOT / "docs" / "page.png", dpi=110)


def screenshots(run: Path) -> None:
    """The page of `run` from the answer to the curve, in few colours, so that the files stay small."""
    import io

    from PIL import Image

    from tightfit.report import page as page_of
    from tightfit.report import run_document

    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        file = Path(folder) / "page.html"
        file.write_text(page_of(run_document(run)), encoding="utf-8")
        for width, name in ((1280, "report"), (390, "report_390")):
            tab = chromium.page()
            tab.open(file, width=width)
            end = int(tab.ask("document.getElementById('curve').getBoundingClientRect().bottom + scrollY")) + 20
            picture = Image.open(io.BytesIO(tab.picture())).convert("RGB")
            few = picture.crop((0, 0, width, end)).quantize(
                128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
            )
            few.save(ROOT / "docs" / f"{name}.png", optimize=True)


def main(arguments: list[str]) -> int:
    if "--screenshots" in arguments:
        screenshots(Path(arguments[-1]))
        return 0
    if "--draw-only" not in arguments:
        drawn.write(RESULTS, record())
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
