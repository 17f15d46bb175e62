"""JupyterLab on loopback, a real browser before it, and what a person does with both.

    with jupyter_lab(folder, home) as lab, chromium() as browser, visit(browser) as (page, seen):
        open_notebook(page, lab, "01_sae_lora.ipynb")
        run_all(page)

No wait has a fixed length: every step waits for what it needs, up to `SECONDS`.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # names lead nowhere
SECONDS = 120
"""Longest wait for anything; only a failing test waits so long."""

# The server ends when its standard input does, so it never outlives the tests, killed or not.
SERVER = """
import os, signal, sys, threading
def stop():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
from jupyterlab.labapp import main
main()
"""
OPTIONS = {
    "ServerApp.ip": "127.0.0.1",
    "ServerApp.port": 0,  # any that is free
    "ServerApp.open_browser": False,
    "ServerApp.allow_root": True,
    "LabApp.extension_manager": "readonly",  # the other one asks PyPI
    "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
}
NO_NEWS = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}


@dataclass(frozen=True)
class Lab:
    """A running server."""

    url: str
    token: str

    def address(self, name: str) -> str:
        """Of a notebook in the server's folder, alone in a fresh workspace."""
        return f"{self.url}lab/tree/{quote(name)}?reset&token={self.token}"


@contextmanager
def jupyter_lab(folder: Path, home: Path) -> Iterator[Lab]:
    """A server whose root is `folder` and that keeps all of its own files in `home`."""
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "page_config.json").write_text(json.dumps(NO_NEWS))
    token = secrets.token_hex(16)
    options = {**OPTIONS, "ServerApp.root_dir": folder, "IdentityProvider.token": token}
    own = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA")}
    own |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython")}
    with open(home / "log.txt", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *(f"--{name}={x}" for name, x in options.items())],
            env={"OMP_WAIT_POLICY": "passive", **os.environ, **own, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        yield Lab(_url_of(server, home), token)
    finally:
        stop(server)


def stop(server: subprocess.Popen) -> None:
    """End the server and its kernels: by asking, and what is left after 10 seconds by force."""
    family = [psutil.Process(server.pid)] if server.poll() is None else []
    family += [child for parent in family for child in parent.children(recursive=True)]
    server.stdin.close()
    for process in psutil.wait_procs(family, timeout=10)[1]:
        process.kill()
    server.wait()


def _url_of(server: subprocess.Popen, home: Path) -> str:
    """The server's address, as soon as it listens there."""
    end = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            (file,) = (home / "runtime").glob("jpserver-*.json")
            return json.loads(file.read_text())["url"]
        except ValueError:  # no file, or half of it
            time.sleep(0.05)
    raise RuntimeError(f"JupyterLab did not start:\n{(home / 'log.txt').read_text()}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's browser, without a window; the network's names lead nowhere."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, NOWHERE], timeout=1000 * SECONDS
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Seen:
    """What a page asked for, and what it said."""

    urls: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    @property
    def outside(self) -> list[str]:
        """Addresses on other machines."""
        local = ("data", "blob", "about", "file")
        parts = [(url, urlsplit(url)) for url in self.urls]
        return [u for u, p in parts if p.scheme not in local and p.hostname != "127.0.0.1"]


@contextmanager
def visit(browser: Browser, width: int = 1600, height: int = 1000) -> Iterator[tuple[Page, Seen]]:
    """An empty page of a fresh profile."""
    expect.set_options(timeout=1000 * SECONDS)
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(1000 * SECONDS)
    seen = Seen()

    def dismiss(dialog) -> None:
        seen.dialogs.append(dialog.message)
        dialog.dismiss()

    context.on("request", lambda request: seen.urls.append(request.url))
    context.on("dialog", dismiss)
    page = context.new_page()
    page.on("websocket", lambda socket: seen.urls.append(socket.url))
    try:
        yield page, seen
    finally:
        context.close()


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of code cells for the kernel python3."""
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    written = [{**cell, "id": f"cell-{i}", "source": source} for i, source in enumerate(cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    about = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel}
    path.write_text(json.dumps({**about, "cells": written}))


def open_notebook(page: Page, lab: Lab, name: str) -> None:
    """Open it and wait until its kernel waits for work."""
    page.goto(lab.address(name))
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle")


def run_all(page: Page) -> None:
    """Run all cells from the menu and wait until the last one is done; none may be empty.

    Raises:
        AssertionError: a cell failed; the message is its traceback.
    """
    for item in ("Run", "Run All Cells"):
        page.get_by_role("menuitem", name=item, exact=True).click()
    tracebacks = page.locator(
        ".jp-CodeCell .jp-OutputArea-output", has_text="Traceback (most recent call last)"
    )
    cells = page.locator(".jp-CodeCell")
    done = cells.filter(has=page.locator(".jp-InputPrompt", has_text=re.compile(r"\d")))
    end = tracebacks.or_(done.nth(cells.count() - 1)).first
    expect(end).to_be_attached(timeout=1000 * SECONDS)
    assert not tracebacks.count(), tracebacks.first.inner_text()


def click_slider(slider: Locator, share: float) -> None:
    """Click at this share of the slider's way, 0 the lowest value and 1 the highest."""
    expect(slider.locator(".noUi-state-tap")).to_have_count(0)  # still moving, it takes no click
    track = slider.locator(".noUi-base")
    box = track.bounding_box()
    track.click(position={"x": share * (box["width"] - 1), "y": box["height"] / 2}, force=True)
