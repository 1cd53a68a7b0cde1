"""The server's page in a browser, round a real model and round an engine that echoes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.page.browser import CHROMIUM, Browser, BrowserPage, browser
from tests.server.served import served
from tests.server.test_live import Live

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]

READY = "document.querySelector('#state').textContent === 'ready'"
LISTED = "document.querySelectorAll('.slot').length > 20"
WHOLE = "document.querySelectorAll('.assistant:not(.busy)').length === {count}"
ANSWER = ".assistant:last-child .text"
HOSTILE = (
    "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
    "\n```html\n<b>bold</b>\n```\n<svg/onload=alert(2)>"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(["model=smollm2", "platform=cpu", "attention=sdpa"]) as address:
        yield address


@pytest.fixture
def page(chromium: Browser, url: str) -> Iterator[BrowserPage]:
    """Ready, with greedy sampling. At the end nothing may have gone wrong in silence."""
    opened = chromium.open(f"{url}/")
    opened.wait(READY)
    opened.wait(LISTED)
    opened.click("#settings summary")
    opened.fill("#temperature", "0")
    yield opened
    check_quiet(opened, url)


def check_quiet(page: BrowserPage, url: str) -> None:
    """No exception, no violation of the policy, no request to another host."""
    assert page.complaints() == []
    others = {one for one in page.urls() if not one.startswith((f"{url}/", "data:"))}
    assert not others


def ask(page: BrowserPage, text: str, count: int = 1) -> None:
    """Send a message and wait for the whole answer, the ``count``-th."""
    page.fill("#question", text)
    page.enter()
    page.wait(WHOLE.format(count=count))


def test_an_answer_is_streamed_and_measured(page: BrowserPage) -> None:
    page.run(
        "window.grown = []; new MutationObserver(() => {"
        " const node = document.querySelector('.assistant.busy .text');"
        " if (node) window.grown.push(node.textContent.length);"
        "}).observe(document.querySelector('#log'), {subtree: true, childList: true, "
        "characterData: true}); 0"
    )
    page.fill("#max-tokens", "24")
    ask(page, "What is the capital of France?")
    assert "Paris" in page.text(ANSWER)
    grown = page.run("window.grown")
    assert len({*grown}) > 3, "it came piece by piece"
    assert grown == sorted(grown)
    assert "tokens/s" in page.text(".assistant .note")
    assert "first after" in page.text(".assistant .note")
    page.wait("document.querySelector('#blocks').textContent.includes(' of ')")
    page.wait("document.querySelector('#running').textContent === '0'")
    assert "0 running, 0 waiting" in page.text("[data-container=EngineContainer] .live")
    page.wait("document.querySelector('#line').points.length > 1")
    ask(page, "And of Italy?", count=2)
    roles = [message["role"] for message in page.bodies()[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_a_tool_call_is_a_card(page: BrowserPage) -> None:
    page.click("#example")
    page.run("document.querySelector('#tool-choice').value = 'required'")
    ask(page, "What is the weather in Paris, in celsius?")
    assert page.text(".call header strong") == "get_weather"
    arguments = json.loads(page.run("document.querySelector('.call pre').textContent"))
    assert {*arguments} == {"city", "unit"}
    assert arguments["unit"] in ("celsius", "fahrenheit")
    page.run("document.querySelector('#tool-choice').value = 'none'")
    page.fill("#max-tokens", "16")
    page.fill(".call textarea", "21 degrees, sunny")
    page.click(".assistant button")
    page.wait(WHOLE.format(count=2))
    assert page.text(".turn.tool") == "get_weather answered: 21 degrees, sunny"
    assert page.text(ANSWER)
    assert not page.run("document.querySelectorAll('.error').length")


def test_the_assembly_says_what_runs(page: BrowserPage) -> None:
    slot = "[data-slot=attention]"
    assert page.text(f"{slot} .class") == "attention.sdpa.SdpaAttention"
    assert page.text(f"{slot} .chooser") == "command line"
    assert "paged" in page.text(f"{slot} .others")
    page.click(f"{slot} summary")
    assert "command line: attention=sdpa" in page.text(f"{slot} dl")
    assert "attention=paged" in page.text(f"{slot} dl")
    kinds = page.run("[...document.querySelectorAll('.container')].map(n => n.dataset.container)")
    assert kinds == ["ServerContainer", "EngineContainer", "WorkerContainer"]
    where = f"document.querySelector('{slot}').parentNode.dataset.container"
    assert page.run(where) == "WorkerContainer"


def test_an_error_of_the_server_is_shown_as_it_is(page: BrowserPage) -> None:
    page.run("document.querySelector('#tools').value = '[{\"type\": \"function\"}]'")
    ask(page, "hello")
    assert "expected" in page.text(".error")
    assert "status 400, param tools, request req-" in page.text(".error")
    assert page.run("document.querySelector('#question').value") == "hello", "to be sent again"
    page.run("document.querySelector('#tools').value = '[{'")
    page.enter()
    page.wait("document.querySelectorAll('.error').length === 2")
    assert "the tools are not JSON" in page.text(".assistant:last-child .error")


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_and_wide_in_both_schemes(chromium: Browser, url: str, dark: bool) -> None:
    page = chromium.open(f"{url}/", width=400, height=800, dark=dark)
    page.wait(LISTED)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    shown = "['chat', 'assembly'].filter(id => document.getElementById(id).offsetParent !== null)"
    for view in ("chat", "assembly"):
        page.click(f"[data-show={view}]")
        assert page.run(shown) == [view]
        assert page.run(overflow) <= 0
        inner = f"document.querySelector('#{view}')"
        assert page.run(f"{inner}.scrollWidth - {inner}.clientWidth") <= 0
    page.resize(1440, 900)
    assert page.run(shown) == ["chat", "assembly"]
    assert page.run(overflow) <= 0
    colour = "getComputedStyle(document.body).{}.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    ground, text = page.run(colour.format("backgroundColor")), page.run(colour.format("color"))
    assert (ground < text) == dark
    check_quiet(page, url)


def test_it_can_be_used_by_keyboard(page: BrowserPage) -> None:
    bare = "[...document.querySelectorAll('input, select, textarea')].filter(f => !f.labels.length)"
    assert page.run(f"{bare}.map(f => f.id)") == []
    page.run("document.querySelector('#question').focus()")
    seen = set()
    for _ in range(60):
        page.press("Tab", 9)
        seen.add(page.run("document.activeElement.id || document.activeElement.tagName"))
        outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.run("document.activeElement === document.body")
    assert {"clear", "send", "SUMMARY"} <= seen


def test_hostile_text_stays_text(chromium: Browser) -> None:
    with Live() as live:
        page = chromium.open(f"{live.url}/")
        page.wait(READY)
        page.click("#settings summary")
        page.fill("#max-tokens", str(len(HOSTILE.encode())))
        ask(page, HOSTILE)
        words = page.run(f"document.querySelector('{ANSWER}').textContent")
        for piece in HOSTILE.replace("```html", "```").split("```"):
            assert piece.strip() in words
        assert page.text(".turn.user") == HOSTILE
        made = "#log img, #log script, #log a, #log svg, #log b"
        assert page.run(f"document.querySelectorAll('{made}').length") == 0
        assert page.text(f"{ANSWER} pre") == "<b>bold</b>"
        assert page.run("document.title") == "vllm-di"
        refused = page.run(
            "try { document.body.innerHTML = '<b>'; 'taken' } catch (error) { error.name }"
        )
        assert refused == "TypeError", "the policy forbids markup from strings"


def test_an_answer_can_be_stopped(chromium: Browser) -> None:
    with Live(engine={"patience": 3}) as live:
        page = chromium.open(f"{live.url}/")
        page.wait(READY)
        for count, by_key in enumerate((True, False)):
            page.fill("#question", "abcdef")
            page.enter()
            page.wait("document.querySelector('.busy .text')?.textContent.length >= 3")
            if by_key:
                page.press("Escape", 27)
            else:
                page.click("#stop")
            page.wait(WHOLE.format(count=count + 1))
            assert "finish_reason stopped" in page.text(".assistant:last-child .note")
            assert page.run("document.querySelector('#send').hidden") is False
        check_quiet(page, live.url)
    assert len(live.engine.aborted) == 2


def test_a_key_is_asked_for_and_stays_in_the_tab(chromium: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-good-key\n")
    with Live(api_key_file=str(keys)) as live:
        page = chromium.open(f"{live.url}/")
        asked = "!document.querySelector('#ask-key').hidden"
        page.wait(asked)
        assert page.run("document.querySelectorAll('.slot').length") == 0
        page.fill("#key", "a-bad-key")
        page.enter()
        page.wait(f"{asked} && document.querySelector('#key-note').textContent")
        assert "does not accept" in page.text("#key-note")
        page.fill("#key", "a-good-key")
        page.enter()
        page.wait("document.querySelectorAll('.slot').length > 0")
        page.click("#settings summary")
        page.fill("#max-tokens", "5")
        ask(page, "hello")
        assert page.text(ANSWER) == "hello"
        assert page.run("document.cookie + JSON.stringify(localStorage)") == "{}"
        assert not [one for one in page.urls() if "key" in one.rpartition("/")[2]]
        page.call("Page.reload")
        page.wait("document.querySelectorAll('.slot').length > 0")
        page.click("#forget")
        page.wait(asked)
        assert page.run("JSON.stringify(sessionStorage)") == "{}"
        check_quiet(page, live.url)


def test_a_hidden_tab_asks_for_nothing(chromium: Browser) -> None:
    with Live() as live:
        page = chromium.open(f"{live.url}/")
        page.wait(READY)

        def see(hidden: bool) -> None:
            value = json.dumps(hidden)
            page.run(
                "Object.defineProperty(document, 'hidden', "
                f"{{configurable: true, get: () => {value}}});"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )

        see(True)
        page.run("new Promise(done => setTimeout(done, 300))")  # for what is on its way
        before = len(page.urls())
        page.run("new Promise(done => setTimeout(done, 2500))")
        assert len(page.urls()) == before
        see(False)
        page.wait(READY)
        while len(page.urls()) == before:
            page.run("new Promise(done => setTimeout(done, 50))")
