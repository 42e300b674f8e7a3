"""The chat page in a browser: `pytest --slow tests/server/test_page.py`.

Needs Debian's `chromium` and `chromium-driver`, and `pip install 'qjax[browser]'`.
"""

import re
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

import qjax
from tests.server.browser import Tab, chromium
from tests.server.conftest import MAX_MODEL_LEN, Running, engine_of, serving
from tests.server.scripted import BREAK, MODEL, Script, scripted

pytestmark = pytest.mark.slow

KEY = "zweiter-schlüssel"
MARKUP = (
    """<img src=x onerror="document.title='ran'"><script>document.title='ran'</script><b>&amp;"""
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def tab(driver: Any) -> Iterator[Tab]:
    """In the end its console has no errors, but for those that the test expects."""
    tab = Tab(driver)
    yield tab
    errors = [each for each in tab.errors() if not any(word in each for word in tab.refused)]
    driver.get("about:blank")
    assert errors == []


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as script:
        yield script


@pytest.fixture(scope="module")
def model(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture(scope="module")
def served(model: qjax.Params) -> Iterator[Running]:
    with serving(lambda: engine_of(model)) as running:
        yield running


def test_a_conversation(tab: Tab, served: Running) -> None:
    """With temperature 0, it is what OpenAI's client gets."""
    tab.open(served.url)
    tab.until(lambda: tab.texts("#about") != [""])
    assert tab.texts("#model") == ["tiny"]
    (about,) = tab.texts("#about")
    assert re.fullmatch(rf"gguf · q4_1 · [\d.]+ bits a weight · {MAX_MODEL_LEN} tokens", about)
    assert tab.driver.title == "tiny · qjax"
    tab.set("#temperature", "0")
    tab.send("hello")
    answer = tab.answered()
    with served.client() as client:
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], temperature=0
        )
    assert found.choices[0].message.content
    assert answer.split() == found.choices[0].message.content.split()
    assert found.usage is not None
    (note,) = tab.texts(".note")
    assert re.match(rf"{found.usage.completion_tokens} tokens · [\d.]+ tokens/s", note)
    assert found.choices[0].finish_reason == "length"
    assert note.endswith(" · no room for more")
    # The context is full: what the server says of that is shown, and what was typed is not lost.
    tab.refused = ["400 (Bad Request)"]
    tab.send("and now?")
    (error,) = tab.until(lambda: tab.texts("#error"))
    assert str(MAX_MODEL_LEN) in error
    assert tab.value("#text") == "and now?"
    assert tab.texts(".user") == ["hello"]
    tab.find("#clear").click()
    assert (tab.texts(".message"), tab.texts(".note"), tab.texts("#error")) == ([], [], [])


def test_stop(tab: Tab, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether something has come or not, the server goes on to others at once."""
    steps, step = threading.Semaphore(0), qjax.Engine.step

    def held(self: qjax.Engine) -> list[Any]:
        assert steps.acquire(timeout=60)
        return step(self)

    def stopped(stop: Callable[[], None]) -> None:
        served.until(lambda: served.service.sequences == 1)
        stop()
        served.until(lambda: served.service.sequences == 0)
        assert tab.until(lambda: tab.texts("#send")) == ["Send"]

    monkeypatch.setattr(qjax.Engine, "step", held)
    before = served.ended("abort")
    tab.open(served.url)
    tab.set("#temperature", "0")
    tab.send("hello")
    stopped(lambda: tab.find("#stop").click())
    assert (tab.texts(".message"), tab.value("#text")) == ([], "hello")

    steps.release(8)
    tab.send("hello")
    (part,) = tab.until(lambda: [text for text in tab.texts(".assistant") if text.strip("…")])
    assert tab.texts("#stop") == ["Stop"]
    stopped(lambda: tab.find("#text").send_keys("\ue00c"))  # Escape
    assert tab.texts(".user") == ["hello"]
    assert tab.texts(".assistant")[0].startswith(part)
    assert tab.texts(".note")[0].endswith("stopped")

    while steps.acquire(blocking=False):
        pass
    tab.send("hello")
    served.until(lambda: served.service.sequences == 1)
    tab.find("#clear").click()
    served.until(lambda: served.service.sequences == 0)
    assert tab.until(lambda: tab.texts("#send")) == ["Send"]
    assert (tab.texts(".message"), tab.texts(".note"), tab.value("#text")) == ([], [], "")
    steps.release(10_000)
    served.idle()
    assert served.ended("abort") - before == 3


def test_a_key(tab: Tab, model: qjax.Params) -> None:
    tab.refused = ["401 (Unauthorized)"]
    with serving(lambda: engine_of(model), api_keys=["another", KEY]) as running:
        tab.open(running.url)
        assert tab.until(lambda: tab.texts("#guard label")) == ["This server asks for a key:"]
        tab.until(lambda: tab.run("return document.activeElement.id") == "key")
        assert tab.texts("#error") == []
        tab.set("#key", "ключ\ue007")
        (error,) = tab.until(lambda: tab.texts("#error"))
        assert error == "Authorization must be a Bearer header with a valid API key."
        tab.set("#key", f" {KEY}\ue007")
        tab.until(lambda: tab.texts("#model") == ["tiny"])
        tab.until(lambda: (tab.texts("#guard"), tab.texts("#error")) == ([], []))
        tab.send("hello")
        assert tab.answered()
        assert KEY not in tab.run(
            "return document.cookie + location + JSON.stringify(localStorage)"
        )


def test_while_the_model_loads(tab: Tab, model: qjax.Params) -> None:
    tab.refused = ["503 (Service Unavailable)"]
    loaded = threading.Event()

    def load() -> qjax.Engine:
        assert loaded.wait(60)
        return engine_of(model)

    with serving(load, wait=False) as running:
        tab.open(running.url)
        (error,) = tab.until(lambda: tab.texts("#error"))
        assert error == "the model is still loading."
        loaded.set()
        tab.until(lambda: tab.texts("#model") == ["tiny"])
        assert tab.texts("#error") == []


def test_answers_grow_as_they_come(tab: Tab, script: Script) -> None:
    tab.open(script.url)
    tab.until(lambda: tab.texts("#about") == ["gptq · 4.5 bits a weight · 512 tokens"])
    tab.send("first\ue008\ue007\ue008second")  # Shift+Enter between them
    pieces = "One", " two…", " drei ünd 四\n", "  five"
    for piece, whole in zip(pieces, accumulate(pieces), strict=True):
        script.say(piece)
        tab.until(lambda whole=whole: tab.texts(".assistant") == [whole.rstrip()])
        assert tab.texts("#send") == []
    tab.until(lambda: re.fullmatch(r"4 tokens · [\d.]+ tokens/s", tab.texts(".note")[0]))
    script.say(None)
    tab.until(lambda: tab.texts("#send"))
    assert tab.texts(".user") == ["first\nsecond"]
    tab.send("next")
    script.say("yes", None)
    assert tab.answered() == "yes"
    asked = script.asked[-1]
    assert asked["temperature"] == 0.7
    assert asked["messages"] == [
        {"role": "user", "content": "first\nsecond"},
        {"role": "assistant", "content": "".join(pieces)},
        {"role": "user", "content": "next"},
    ]
    tab.set("#temperature", "2.5")
    tab.find("#send").click()
    tab.find("#temperature").clear()
    tab.send("last")
    script.say("yes", None)
    assert tab.answered() == "yes"
    assert len(script.asked) == 3
    assert "temperature" not in script.asked[-1]


def test_markup_is_text(tab: Tab, script: Script) -> None:
    script.model = {**MODEL, "id": MARKUP}
    tab.open(script.url)
    tab.until(lambda: tab.texts("#model") == [MARKUP])
    tab.send(MARKUP)
    script.say(*MARKUP, "\n```", MARKUP, "\n", MARKUP, "\n```\n", None)
    assert tab.answered() == MARKUP + MARKUP
    assert tab.texts("pre") == [MARKUP]
    assert tab.texts(".user") == [MARKUP]
    tab.send("again")
    script.say({"error": {"message": MARKUP}}, None)
    tab.until(lambda: tab.texts("#error") == [MARKUP])
    assert tab.run("return document.querySelectorAll('img, b, body script').length") == 1
    assert tab.driver.title == f"{MARKUP} · qjax"


def test_code(tab: Tab, script: Script) -> None:
    tab.open(script.url)
    tab.send("code")
    script.say(*"```1``` is\n\n```py\ndef f():\n    return `1`\n```\n\nor\n  ```\nx", None)
    tab.answered()
    assert tab.texts(".assistant > *") == ["```1``` is", "def f():\n    return `1`", "or", "x"]
    assert tab.texts("pre") == ["def f():\n    return `1`", "x"]
    assert tab.run("return getComputedStyle(document.querySelector('pre')).whiteSpace") == "pre"


def test_what_goes_wrong(tab: Tab, script: Script) -> None:
    """Nobody has to type it again, and the chat goes on without it."""
    tab.refused = ["429 (Too Many Requests)", "ERR_"]
    tab.open(script.url)
    tab.find("#text").send_keys("early")
    for items, message in (
        ([429], script.message),
        ([BREAK], "The answer broke off."),
        ([{"error": {"message": "internal error."}}, None], "internal error."),
        ([None], "The model answered nothing."),
    ):
        tab.send("one")
        script.say(*items)
        tab.until(lambda message=message: tab.texts("#error") == [message])
        assert (tab.texts(".message"), tab.value("#text")) == ([], "one")
    tab.send("two")
    script.say("half", BREAK)
    tab.until(lambda: tab.texts("#error") == ["The answer broke off."])
    assert (tab.texts(".assistant"), tab.value("#text")) == (["half"], "")
    tab.send("three")
    script.say("whole", None)
    assert tab.answered() == "whole"
    assert [each["content"] for each in script.asked[-1]["messages"]] == ["two", "half", "three"]
    assert tab.texts("#error") == []


def test_a_server_that_is_gone(tab: Tab) -> None:
    tab.refused = ["ERR_CONNECTION_REFUSED"]
    with scripted() as script:
        tab.open(script.url)
        tab.until(lambda: tab.texts("#about") != [""])
    tab.send("hello")
    tab.until(lambda: tab.texts("#error") == ["The server cannot be reached."])
    assert tab.value("#text") == "hello"


LONG = "Donaudampfschifffahrts" * 30
EVERYTHING = f"Text {LONG}\n```\n{LONG}\n```\n" + "- a line of a list\n" * 40


def say_everything(tab: Tab, script: Script) -> None:
    """Has the page show all that it can show."""
    script.model = {**MODEL, "id": f"org/{LONG}"}
    tab.until(lambda: tab.texts("#about") != [""])
    tab.send(LONG)
    script.say(EVERYTHING, "end", None)
    tab.answered()
    tab.send("again")
    script.message = LONG
    script.say(401)
    tab.until(lambda: tab.texts("#error"))


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (1280, 800)])
def test_nothing_sticks_out(tab: Tab, script: Script, width: int, height: int) -> None:
    tab.refused = ["401 (Unauthorized)"]
    script.model = {**MODEL, "id": f"org/{LONG}"}
    tab.open(script.url, width, height)
    say_everything(tab, script)
    sizes = """
        const wide = [...document.querySelectorAll("html, body, body *:not(pre, input)")]
            .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth && e.clientWidth);
        const right = [...document.querySelectorAll("body *")].filter(e =>
            e.checkVisibility() && e.getBoundingClientRect().right > innerWidth);
        return [...wide, ...right].map(e => e.outerHTML.slice(0, 80));
    """
    assert tab.run(sizes) == []
    assert tab.run("return document.querySelector('pre').scrollWidth") > width
    # The end of the answer can be seen, and so can all that one can do.
    end = """
        const bottom = name => document.querySelector(name).getBoundingClientRect().bottom;
        return bottom("#messages") <= bottom("main");
    """
    tab.until(lambda: tab.run(end))
    below = "return document.documentElement.scrollHeight - innerHeight"
    assert tab.run(below) <= 0
    for selector in ("#text", "#send", "#temperature", "#clear"):
        box = tab.find(selector).rect
        assert 0 <= box["y"] < box["y"] + box["height"] <= height


def test_who_reads_is_left_alone(tab: Tab, script: Script) -> None:
    tab.open(script.url)

    def below() -> float:
        return tab.run(
            "const m = document.querySelector('main');"
            "return m.scrollHeight - m.clientHeight - m.scrollTop"
        )

    def say(lines: int) -> None:
        before = tab.run("return document.querySelector('main').scrollHeight")
        script.say("a line\n" * lines + ".")
        tab.until(lambda: tab.run("return document.querySelector('main').scrollHeight") > before)

    tab.send("lines")
    say(80)
    tab.until(lambda: below() <= 1)
    say(80)
    tab.until(lambda: below() <= 1)
    tab.run("document.querySelector('main').scrollTop -= 500")
    tab.until(lambda: below() >= 499)
    top = tab.run("return document.querySelector('main').scrollTop")
    say(20)
    say(20)
    assert tab.run("return document.querySelector('main').scrollTop") == top
    script.say(None)
    tab.answered()
    assert tab.run("return document.querySelector('main').scrollTop") == top
    tab.send("on")
    tab.until(lambda: below() <= 1)
    script.say("yes", None)
    assert tab.answered() == "yes"


def luminance(colour: list[float]) -> float:
    """Of sRGB in [0, 255]; WCAG 2.2, "relative luminance"."""
    linear = [c / 3294.6 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(tab: Tab, script: Script, scheme: str) -> None:
    """A contrast of 4.5, as WCAG's level AA asks for."""
    tab.refused = ["401 (Unauthorized)"]
    tab.open(script.url, scheme=scheme)
    colours = """
        const back = e => {
            const found = getComputedStyle(e).backgroundColor;
            return found === "rgba(0, 0, 0, 0)" ? back(e.parentElement) : found;
        };
        const shown = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility()
            && (e.matches("input, textarea")
                || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())));
        const pairs = shown.map(e => [e.id || e.className || e.localName,
            getComputedStyle(e).color, back(e)]);
        const hint = document.querySelector("#text");
        return [...pairs, ["hint", getComputedStyle(hint, "::placeholder").color, back(hint)]];
    """
    say_everything(tab, script)
    seen = set()
    for name, *pair in tab.run(colours):
        front, back = (luminance([float(x) for x in re.findall(r"[\d.]+", c)]) for c in pair)
        assert (front < back) == (scheme == "light") or name in ("send", "button"), name
        low, high = sorted((front, back))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, pair)
        seen.add(name)
    assert seen >= {
        "message user",
        "message note",
        "pre",
        "error",
        "about",
        "send",
        "clear",
        "hint",
    }
