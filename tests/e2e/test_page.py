"""The page in a real browser, as a fan meets it. The engine is scripted: what is tested is the page."""

import os

import pytest

import app
from chat import persona
from chat.engine import ScriptedEngine
from tests.conftest import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
SHOTS = ROOT / "runs" / "screenshots"
LONG = "昨夜落了一场雨，院里的海棠谢了大半，我叫槿汐扫了些花瓣收着，预备酿酒。" * 6


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """A function that opens the page for an engine, in a window of that width, and returns the tab."""
    opened = []

    def start(engine, width=1100, height=800):
        page = app.build_page(engine)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        tab = browser.new_page(viewport={"width": width, "height": height}, locale="zh-CN")
        tab.set_default_timeout(15_000)
        opened.extend((tab, page))
        tab.goto(url)
        tab.wait_for_selector("[data-testid=bot]")
        return tab

    yield start
    for thing in opened:
        thing.close()


def say(tab, text):
    tab.fill("textarea:visible", text)
    tab.press("textarea:visible", "Enter")


def shoot(tab, name):
    """Leave a picture for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"{name}.png")


def words(tab, who="bot"):
    return [bubble.inner_text().strip() for bubble in tab.query_selector_all(f"[data-testid={who}]")]


def wait_for_words(tab, text):
    tab.get_by_test_id("bot").filter(has_text=text).last.wait_for()


def test_she_greets_and_answers_and_the_box_is_free_again(visit):
    tab = visit(ScriptedEngine("臣妾甄嬛，见过这位贵客。", pause=0.02))
    assert persona.GREETING in words(tab)[0]
    shoot(tab, "greeting")
    say(tab, "你是谁？")
    wait_for_words(tab, "见过这位贵客。")
    assert words(tab, "user") == ["你是谁？"] and len(words(tab)) == 2
    assert tab.is_enabled("textarea:visible") and tab.input_value("textarea:visible") == ""
    shoot(tab, "answer")


def test_words_grow_while_she_speaks_and_stop_keeps_what_was_said(visit):
    engine = ScriptedEngine(LONG, "再说别的。", pause=0.05)
    tab = visit(engine)
    say(tab, "讲讲昨夜")
    wait_for_words(tab, "昨夜落了一场雨")
    tab.click("button.stop-button:visible")
    tab.wait_for_selector("button.submit-button:visible")
    said = words(tab)[-1]
    assert said and len(said) < len(LONG) and not engine.running
    say(tab, "好")
    wait_for_words(tab, "再说别的。")


@pytest.mark.parametrize("way", ["opener", "edit"])
def test_stop_is_offered_however_she_was_asked(visit, way):
    engine = (
        ScriptedEngine("头一回。", LONG, "再说别的。", pause=0.05)
        if way == "edit"
        else ScriptedEngine(LONG, pause=0.05)
    )
    tab = visit(engine)
    if way == "edit":
        say(tab, "早")
        wait_for_words(tab, "头一回。")
        tab.get_by_label("编辑").last.click()
        tab.locator(".message-wrap textarea").first.fill("讲讲昨夜")
        tab.get_by_label("发送").click()
    else:
        tab.get_by_text(persona.OPENERS[0], exact=True).first.click()
    wait_for_words(tab, "昨夜落了一场雨")
    tab.click("button.stop-button:visible")
    tab.wait_for_selector("button.submit-button:visible")
    said = words(tab)[-1]
    assert said and len(said) < len(LONG)
    tab.wait_for_timeout(1500)
    assert not engine.running and words(tab)[-1] == said
    assert tab.is_enabled("textarea:visible") and tab.locator("button.stop-button:visible").count() == 0
    say(tab, "好")
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 2")


def test_the_page_and_a_stranger_at_the_api_take_turns(visit):
    from gradio_client import Client

    engine = ScriptedEngine("慢慢说来，不必着急。", pause=0.1)
    tab = visit(engine)
    client = Client(tab.url, verbose=False)
    say(tab, "早")
    job = client.submit("早", api_name="/chat")
    wait_for_words(tab, "不必着急。")
    assert job.result(timeout=30)[0] == "慢慢说来，不必着急。"
    assert engine.peak == 1


def test_retry_undo_and_clear(visit):
    engine = ScriptedEngine("头一回。", "第二回。")
    tab = visit(engine)
    say(tab, "再说一遍")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("重试").click()
    wait_for_words(tab, "第二回。")
    assert [m["content"] for m in engine.heard[1][0]] == ["再说一遍"]
    tab.get_by_label("撤销").click()
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    assert tab.input_value("textarea:visible") == "再说一遍"
    say(tab, "再说一遍")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("清空对话").click()
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    wait_for_words(tab, persona.GREETING[:8])


def test_an_edited_question_is_answered_anew(visit):
    engine = ScriptedEngine("头一回。", "改后的回话。")
    tab = visit(engine)
    say(tab, "早")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("编辑").last.click()
    tab.locator(".message-wrap textarea").first.fill("晚安")
    tab.get_by_label("发送").click()
    wait_for_words(tab, "改后的回话。")
    assert engine.heard[1][0][-1]["content"] == "晚安"


def test_a_failure_is_a_line_and_the_box_stays_open(visit):
    tab = visit(ScriptedEngine(RuntimeError("secret"), "好了。"))
    say(tab, "你是谁？")
    wait_for_words(tab, persona.UNWELL[:8])
    assert not [said for said in words(tab) if "secret" in said]
    say(tab, "可好些了？")
    wait_for_words(tab, "好了。")


def test_an_example_is_one_tap(visit):
    tab = visit(ScriptedEngine("臣妾甄嬛。"))
    tab.get_by_text(persona.OPENERS[0], exact=True).first.click()
    wait_for_words(tab, "臣妾甄嬛。")


def test_a_phone_needs_no_sideways_scrolling(visit):
    tab = visit(ScriptedEngine(LONG), width=390, height=844)
    say(tab, "讲讲昨夜")
    wait_for_words(tab, LONG[-12:])
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    box = tab.locator("textarea:visible").first.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 844, "the text box is off the screen"
    shoot(tab, "phone")
