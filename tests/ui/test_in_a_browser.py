"""The page in a real browser: type, answers, heat map, the slider at 0, and both widths.

With CALMLM_SCREENSHOTS=FOLDER its pictures are kept there; those of the documentation are made so.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calmlm.answering import TextModel
from calmlm.communication.looking import look
from calmlm.demo import MODELS
from calmlm.demo.bundle import questions

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: apt-get install chromium"),
]
FOLDER = MODELS / "composition"
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the page, as the command serves it."""
    command = "import sys; from calmlm.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "ui", str(FOLDER), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        found = next((place for line in process.stderr if (place := re.search(r"Open (http://\S+)", line))), None)
        assert found, "the page did not start"
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.stderr.close()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, on which nothing may fail."""
    opened, faults = browser.new_page(viewport={"width": 1280, "height": 900}), []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(address)
    opened.locator("#prompt textarea").wait_for(timeout=WAIT)
    yield opened
    opened.close()
    assert faults == []


def answer(page: Any, which: str) -> str:
    return str(page.locator(f"#answer-{which} textarea").input_value())


def choose(page: Any, dropdown: str, option: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def set_scale(page: Any, value: str) -> None:
    box = page.locator("#scale input[type=number]")
    box.fill(value)
    box.press("Enter")
    box.blur()


def keep(page: Any, tmp_path: Path, name: str) -> None:
    folder = Path(os.environ.get("CALMLM_SCREENSHOTS") or tmp_path)
    page.screenshot(path=folder / name, full_page=True)
    assert (folder / name).stat().st_size < 300_000


def test_ask_look_inside_and_turn_down(page: Any, tmp_path: Path) -> None:
    text, prompt = TextModel.load(str(FOLDER)), questions()[2][0]
    expected = look(text, prompt)
    alone: list[str] = []
    text.write(prompt, alone.append, max_new_tokens=64, anchor_only=True)
    anchor = "".join(alone)
    assert anchor != expected.answer

    page.locator("#prompt textarea").fill(prompt)
    page.locator("#ask").click()
    page.locator("#heat td").first.wait_for(timeout=WAIT)
    assert answer(page, "composition") == expected.answer
    assert answer(page, "1") == anchor
    assert answer(page, "0")
    one = expected.attention[0]
    assert page.locator("#heat td").count() == one.weights.shape[1] * (one.weights.shape[2] + 1)
    assert f": {float(one.weights.mean(0)[2, 3]):.3f}" in page.locator("#heat tbody tr").nth(2).locator("td").nth(
        3
    ).get_attribute("title")
    assert f"{expected.silenced['augmenting'][0]:+.2f}" in page.locator("#tokens").inner_text()
    assert f"{max(expected.contributions[one.label]):.3f}" in page.locator("#added").inner_text()
    keep(page, tmp_path, "ui-1280.png")

    # On a telephone nothing stands beside the screen.
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#prompt textarea").fill(prompt)  # which lets the box grow
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    keep(page, tmp_path, "ui-390.png")

    # Another connection, another head.
    other = expected.attention[1]
    choose(page, "connection", other.label)
    choose(page, "head", "2")
    cell = page.locator("#heat tbody tr").nth(1).locator("td").nth(1)
    playwright.expect(cell).to_have_attribute(
        "title", re.compile(re.escape(f": {float(other.weights[2, 1, 1]):.3f}")), timeout=WAIT
    )

    # The slider: at 0 the anchor answers, at 1 the composition again.
    set_scale(page, "0")
    playwright.expect(page.locator("#answer-composition textarea")).to_have_value(anchor, timeout=WAIT)
    playwright.expect(page.locator("#heat")).to_contain_text("nothing is attended to", timeout=WAIT)
    assert page.locator("#heat td").count() == 0
    page.locator("#scale input[type=range]").focus()
    page.keyboard.press("End")
    playwright.expect(page.locator("#answer-composition textarea")).to_have_value(expected.answer, timeout=WAIT)
    page.locator("#heat td").first.wait_for(timeout=WAIT)


def test_another_prompt_and_one_that_is_too_long(page: Any) -> None:
    page.locator("#prompt textarea").fill("a b " * 600)
    page.locator("#ask").click()
    page.get_by_text("Expected a prompt shorter than the context of 512 tokens").first.wait_for(timeout=WAIT)
    assert "must have from 1 to" in answer(page, "0") and "shorten it" in answer(page, "1")
    page.get_by_text("More", exact=True).click()
    page.locator("#other textarea").fill(questions()[3][0])
    page.locator("#prompt textarea").fill("<img src=x onerror=alert(1)> & 1 + 1 =")
    page.locator("#prompt textarea").press("Enter")
    page.locator("#heat td").first.wait_for(timeout=WAIT)
    assert "swapped" in page.locator("#tokens").inner_text()
    assert page.locator("#heat img").count() == 0
