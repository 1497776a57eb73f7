"""The page in a real browser, as a fan meets it. The engine is a fake: what is tested is the page."""

import re
import time
from pathlib import Path

import pytest

from chat import persona
from page import i18n
from tests.e2e.steps import (
    BOX,
    LONG,
    act,
    enter,
    menu,
    say,
    shoot,
    wait_for_words,
    wait_until,
    wait_until_she_ended,
    words,
)  # fmt: skip
from tests.fake_engine import FakeEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

# Once is enough for what no window changes: the network, the API, what the server does.
once = pytest.mark.parametrize("visit", [1280], indirect=True)


def test_she_greets_and_answers_and_the_box_is_free_again(visit):
    tab = visit(FakeEngine("臣妾甄嬛，见过这位贵客。", pause=0.02))
    assert persona.GREETING in words(tab)[0]
    shoot(tab, "greeting")
    say(tab, "你是谁？")
    wait_for_words(tab, "见过这位贵客。")
    assert words(tab, "user") == ["你是谁？"] and len(words(tab)) == 2
    assert tab.is_enabled(BOX) and tab.input_value(BOX) == ""
    shoot(tab, "answer")


# What is there from the first paint on, and must not move.
FIXED = ["#bar", "#portrait", "#bar h1", "#rank", "#place", "#talk", "#talk .bubble.hers"]
PLACES = """parts => parts.map((part) => document.querySelector(part).getBoundingClientRect())
  .flatMap((box) => [box.x, box.y, box.width, box.height])"""


def before_gradio(tab, path=""):
    """Open the page as on a slow line: Gradio's scripts are on their way. Returns a function that lets them come."""
    scripts = "**/assets/*.js"
    tab.route(scripts, lambda _: None)
    tab.goto(tab.url.split("?")[0] + path, wait_until="commit")
    tab.wait_for_selector("#talk ~ gradio-app, #room ~ gradio-app", state="attached")

    def come():
        tab.unroute(scripts)
        tab.reload()
        tab.wait_for_selector("body[data-ready]")

    return come


SHIFT = """new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
  window.shift = (window.shift ?? 0) + entry.value
})).observe({type: 'layout-shift', buffered: true})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_she_greets_before_gradio_comes_and_nothing_moves_when_it_does(visit, locale, scheme):
    tab = visit(FakeEngine("好"), locale=locale, color_scheme=scheme, init=SHIFT)
    come = before_gradio(tab)
    greeting = persona.GREETING if locale == "zh-CN" else i18n.ENGLISH["永寿宫"][0]
    assert tab.inner_text("#talk .bubble.hers").strip() == greeting and not tab.query_selector(BOX)
    assert tab.is_visible(f"#box [lang={locale[:2]}]")
    assert tab.evaluate(CONTRAST) == [] and tab.evaluate("document.body.matches('.dark')") == (scheme == "dark")
    shoot(tab, f"first-{locale}-{scheme}")
    there = tab.evaluate(PLACES, FIXED)
    come()
    assert tab.evaluate(PLACES, FIXED) == pytest.approx(there, abs=1)
    assert tab.evaluate("window.shift ?? 0") < 0.02


@once
def test_who_comes_back_to_a_talk_or_by_a_link_is_not_greeted_first(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    document = tab.context.request.get(tab.url).text()
    assert persona.GREETING in document
    modules = "**/main.js"
    for path in ("", "?q=早&scene=太后"):
        tab.route(modules, lambda route: route.abort())
        tab.goto(tab.url.split("?")[0] + path, wait_until="commit")
        tab.wait_for_selector("#box")
        assert words(tab) == []
    tab.unroute(modules)
    tab.goto(tab.url.split("?")[0])
    wait_for_words(tab, "臣妾甄嬛。")


def assert_silent_within_a_second(engine):
    """By the engine's own count of what it said."""
    time.sleep(1)
    generated = engine.generated
    time.sleep(0.5)
    assert 0 < engine.generated == generated < len(LONG) and not engine.running


def test_words_grow_while_she_speaks_and_stop_keeps_them_and_frees_the_engine_within_a_second(visit):
    engine = FakeEngine(LONG, "再说别的。", pause=0.05)
    tab = visit(engine)
    say(tab, "讲讲昨夜")
    wait_for_words(tab, "昨夜落了一场雨")
    tab.click("button.stop-button:visible")
    assert_silent_within_a_second(engine)
    tab.wait_for_selector("button.submit-button:visible")
    said = words(tab)[-1]
    assert said and len(said) < len(LONG)
    say(tab, "好")
    wait_for_words(tab, "再说别的。")


def test_a_question_sent_at_once_after_stop_is_answered_whole(visit):
    engine = FakeEngine(LONG, "再说别的。" * 12, pause=0.05)
    tab = visit(engine)
    failed = []
    tab.on("response", lambda answer: failed.append(answer.url) if answer.status >= 500 else None)
    say(tab, "讲讲昨夜")
    wait_for_words(tab, "昨夜落了一场雨")
    tab.click("button.stop-button:visible")
    tab.wait_for_selector("button.submit-button:visible")
    say(tab, "好")
    wait_for_words(tab, "再说别的。" * 12)
    wait_until(lambda: tab.get_attribute(BOX, "placeholder") == "对她说些什么……")
    assert not failed


@pytest.mark.parametrize("way", ["opener", "edit", "again", "go_on"])
def test_stop_is_offered_however_she_was_asked(visit, way):
    engine = FakeEngine(LONG, pause=0.05) if way == "opener" else FakeEngine("头一回。", LONG, pause=0.05)
    tab = visit(engine)
    if way == "opener":
        tab.get_by_text(persona.OPENERS[0], exact=True).first.click()
    else:
        say(tab, "早")
        wait_for_words(tab, "头一回。")
        wait_until_she_ended(tab)
    if way == "edit":
        act(tab, "edit", of="yours")
        tab.fill(".editor textarea", "讲讲昨夜")
        tab.click(".editor .primary")
    elif way == "go_on":
        act(tab, "edit")
        tab.fill(".editor textarea", "且听我说，")
        tab.click(".editor .primary")
        wait_for_words(tab, "且听我说，")
    if way in ("again", "go_on"):
        act(tab, way)
    wait_for_words(tab, "昨夜落了一场雨")
    tab.click("button.stop-button:visible")
    tab.wait_for_selector("button.submit-button:visible")
    said = words(tab)[-1]
    assert said and len(said) < len(LONG)
    wait_until(lambda: not engine.running)
    tab.wait_for_timeout(500)
    assert words(tab)[-1] == said and tab.locator("button.stop-button:visible").count() == 0
    say(tab, "好")
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 2")


@once
def test_the_page_and_a_stranger_at_the_api_take_turns(visit):
    from gradio_client import Client

    engine = FakeEngine("慢慢说来，不必着急。", pause=0.1)
    tab = visit(engine)
    client = Client(tab.url, verbose=False)
    say(tab, "早")
    job = client.submit("早", api_name="/chat")
    wait_for_words(tab, "不必着急。")
    assert job.result(timeout=30)[0] == "慢慢说来，不必着急。"
    assert engine.peak == 1


def test_another_reply_stands_beside_the_first_and_a_turn_can_be_deleted_and_brought_back(visit):
    engine = FakeEngine("头一回。", "第二回。", "第三句。")
    tab = visit(engine)
    say(tab, "再说一遍")
    wait_for_words(tab, "头一回。")
    wait_until_she_ended(tab)
    assert tab.locator(".actions .count").count() == 0, "nothing to leaf through"
    act(tab, "again")
    wait_for_words(tab, "第二回。")
    wait_until_she_ended(tab)
    assert [m["content"] for m in engine.asked[1][0]] == ["再说一遍"] and tab.inner_text(".actions .count") == "2 / 2"
    act(tab, "earlier")
    wait_for_words(tab, "头一回。")
    say(tab, "好")
    wait_for_words(tab, "第三句。")
    assert [m["content"] for m in engine.asked[2][0]] == ["再说一遍", "头一回。", "好"]
    wait_until_she_ended(tab)
    act(tab, "delete")
    wait_until(lambda: words(tab, "user") == ["再说一遍"])
    tab.click("#notice button")
    wait_until(lambda: words(tab, "user") == ["再说一遍", "好"])


@once
def test_an_earlier_turn_is_answered_anew_only_in_a_branch(visit):
    tab = visit(FakeEngine("一。", "二。"))
    for question, answer in (("甲", "一。"), ("乙", "二。")):
        say(tab, question)
        wait_for_words(tab, answer)
        wait_until_she_ended(tab)
    keys = "rows => rows.map((row) => [...row.querySelectorAll('button')].map((each) => each.dataset.action))"
    first, last = tab.eval_on_selector_all(".actions.hers", keys)
    assert "again" not in first and "again" in last


def test_no_button_is_there_that_can_do_nothing(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    assert tab.locator("#talk .actions").count() == 0, "nothing was said yet"
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    keys = tab.eval_on_selector_all(".actions.hers button", "all => all.map((each) => each.dataset.action)")
    assert keys == ["again", "edit", "copy", "pin", "more"], "she had ended: there is nothing to continue"


def test_a_failure_is_a_line_and_the_box_stays_open(visit):
    tab = visit(FakeEngine(RuntimeError("secret"), "好了。"))
    say(tab, "你是谁？")
    wait_for_words(tab, persona.UNWELL[:8])
    assert not [said for said in words(tab) if "secret" in said]
    say(tab, "可好些了？")
    wait_for_words(tab, "好了。")


def test_an_example_is_one_tap(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    tab.get_by_text(persona.OPENERS[0], exact=True).first.click()
    wait_for_words(tab, "臣妾甄嬛。")


FIT = (Path(__file__).parent / "fit.js").read_text(encoding="utf-8")
LOWEST = {1280: 24, 390: 40}  # px of a control: for a mouse, for a finger


@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_the_page_fits_its_window(visit, locale):
    tab = visit(FakeEngine(LONG), locale=locale)
    least = LOWEST[tab.viewport_size["width"]]
    for width, height in ((None, None), (320, 568), (844, 390)):
        if width:
            tab.set_viewport_size({"width": width, "height": height})
            tab.wait_for_timeout(200)
        high = tab.viewport_size["height"]
        box, talk = (tab.locator(part).bounding_box() for part in (BOX, "#talk"))
        assert box["y"] + box["height"] <= high, "the text box is off the screen"
        assert talk["y"] <= 60 and talk["height"] >= 0.62 * high, "the talk has the window"
        assert tab.evaluate(FIT, least) == []
        shoot(tab, f"fit-{locale}-{high}")
    tab.set_viewport_size({"width": 390, "height": 844} if least == 40 else {"width": 1280, "height": 900})
    say(tab, "讲讲昨夜")
    wait_for_words(tab, LONG[-12:])
    wait_until_she_ended(tab)
    act(tab, "edit")
    assert tab.evaluate(FIT, least) == []
    for opener in ("#place", "#open-talks", "#open-menu"):
        tab.click(opener)
        assert tab.evaluate(FIT, least) == []
        tab.keyboard.press("Escape")
    for part in ("compare", "voice"):
        menu(tab, part)
        tab.wait_for_timeout(300)
        shoot(tab, f"{part}-{locale}")
        assert tab.evaluate(FIT, least) == []


def test_a_scene_has_its_own_opening_and_is_told_to_her_with_who_is_there(visit):
    engine = FakeEngine("山里的月色，比宫里的清。")
    tab = visit(engine)
    enter(tab, "甘露寺", "果郡王")
    wait_for_words(tab, persona.scene_named("甘露寺").greeting[:8])
    assert "莫愁" in tab.inner_text("#rank")
    say(tab, "近来可好？")
    wait_for_words(tab, "比宫里的清。")
    assert engine.asked[0][0] == [{"role": "user", "content": "（甘露寺·果郡王）近来可好？"}]
    assert words(tab, "user") == ["近来可好？"]
    shoot(tab, "scene")


def test_a_line_can_be_suggested_and_sent(visit):
    engine = FakeEngine("娘娘今日气色真好。", "你倒会说话。")
    tab = visit(engine)
    tab.click("#suggest")
    wait_until(lambda: tab.input_value(BOX) == "娘娘今日气色真好。")
    assert engine.asked[0][:2] == ([{"role": "user", "content": ""}], "base")
    wait_until(lambda: tab.is_visible("button.submit-button"))
    tab.press(BOX, "Enter")
    wait_for_words(tab, "你倒会说话。")
    assert words(tab, "user") == ["娘娘今日气色真好。"]


def test_two_replies_side_by_side_are_blind_until_the_vote(visit):
    tab = visit(FakeEngine("左边的话。", "右边的话。"))
    menu(tab, "compare")
    tab.fill("#asked textarea", "你是谁？")
    tab.click("#ask")
    tab.wait_for_function("document.querySelector('#right').innerText.includes('右边的话。')")
    tab.wait_for_selector("#vote-left")
    shoot(tab, "compare")
    assert "scripted" not in tab.inner_text("#left") + tab.inner_text("#right") + tab.inner_text("#verdict")
    tab.click("#vote-left")
    tab.wait_for_function("document.querySelector('#verdict').innerText.includes('scripted')")
    verdict = tab.inner_text("#verdict")
    left = re.search(r"Left: (\w+)", verdict).group(1)
    assert ("适配器 1 票" in verdict) == (left == "scripted") and not tab.is_visible("#vote-left")


def test_provenance_tells_how_to_have_a_reply_again(visit):
    engine = FakeEngine("臣妾甄嬛。")
    tab = visit(engine, permissions=["clipboard-read", "clipboard-write"])
    enter(tab, "甘露寺")
    say(tab, "你是谁？")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    act(tab, "provenance")
    facts = tab.inner_text("#talk .facts")
    seed = engine.asked[0][2].seed
    assert f"{seed}" in facts and "sha256 0123abcd" in facts and "自己说完" in facts
    shoot(tab, "provenance")
    act(tab, "same_again")
    tab.locator("#notice", has_text="已抄下").wait_for()
    address = tab.evaluate("navigator.clipboard.readText()")
    again = visit(url=address)
    wait_until(lambda: again.input_value(BOX) == "你是谁？")
    again.press(BOX, "Enter")
    wait_for_words(again, "臣妾甄嬛。")
    assert engine.asked[1] == engine.asked[0]


def test_those_who_wait_are_told_their_place(visit):
    engine = FakeEngine("慢慢说来，不必着急，喝口茶。", pause=0.2)
    first = visit(engine)
    second = visit(url=first.url)
    say(first, "早")
    wait_until(lambda: engine.running)
    say(second, "早")
    second.locator("[data-testid=bot] .hint", has_text="前面还有 1 位").wait_for()
    shoot(second, "waiting")
    wait_for_words(second, "喝口茶。")
    wait_until_she_ended(second)
    assert engine.peak == 1 and second.locator("#talk .hint").count() == 0


@once
def test_a_closed_tab_frees_the_engine_within_a_second(visit):
    engine = FakeEngine(LONG, pause=0.05)
    tab = visit(engine)
    say(tab, "讲讲昨夜")
    wait_for_words(tab, "昨夜落了一场雨")
    tab.close()
    assert_silent_within_a_second(engine)


def test_stop_beside_two_replies_frees_the_engine_within_a_second(visit):
    engine = FakeEngine(LONG, pause=0.05)
    tab = visit(engine)
    menu(tab, "compare")
    tab.fill("#asked textarea", "你是谁？")
    tab.click("#ask")
    tab.locator("#left, #right").filter(has_text="昨夜落了一场雨").wait_for()
    tab.click("#hush")
    assert_silent_within_a_second(engine)


def test_a_question_asked_while_the_model_is_loaded_is_answered_then(visit):
    engine = FakeEngine("让你久等了。")
    engine.ready = False
    tab = visit(engine)
    say(tab, "你是谁？")
    wait_for_words(tab, persona.DRESSING)
    assert "模型正在装载" in tab.inner_text("#talk .hint") and not engine.asked
    shoot(tab, "loading")
    engine.ready = True
    wait_for_words(tab, "让你久等了。")
    assert words(tab)[-1] == "让你久等了。" and len(words(tab)) == 2
    assert tab.is_enabled(BOX)


LATIN = re.compile(r"[A-Za-z]{3,}")
HAN = re.compile(r"[\u4e00-\u9fff]")
NAMES = {"Chat", "Markdown", "JSON", "ShareGPT", "top", "token", "scripted", "base", "only"}
SEEN = """[...document.querySelectorAll('body *:not(svg, style, script)')].flatMap(e => [
  ...['aria-label', 'title', 'placeholder', 'alt'].map(name => e.getAttribute(name)),
  ...(e.children.length === 0 && e.checkVisibility() ? [e.textContent] : [])]).filter((text) => text?.trim())"""


@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_the_page_speaks_the_visitors_language(visit, locale):
    tab = visit(FakeEngine("臣妾甄嬛。"), locale=locale)
    seen = tab.evaluate(SEEN)
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    for opener in ("#place", "#open-talks", "#open-menu"):
        tab.click(opener)
        seen += tab.evaluate(SEEN)
        shoot(tab, f"{opener[1:]}-{locale}")
        tab.keyboard.press("Escape")
    for part in ("compare", "voice"):
        menu(tab, part)
        tab.wait_for_timeout(300)
        seen += tab.evaluate(SEEN)
    assert not [text for text in seen if "__i18n__" in text]
    if locale == "zh-CN":
        assert not {text for text in seen if set(LATIN.findall(text)) - NAMES - {"scripted"}}
    else:
        names = ("甄嬛", "早", "臣妾甄嬛。", "只用底座", *(n for s in persona.SCENES for n in (s.name, *s.visitors)))
        rest = {re.sub("|".join(names), "", text) for text in seen}
        assert not {text for text in rest if HAN.search(text)}
        assert {"Send", "Side by side", i18n.ENGLISH["永寿宫"][0], "Who are you?"} <= {text.strip() for text in seen}
        assert "Noble Consort Xi" in tab.inner_text("#rank")


@once
def test_while_she_answers_the_page_says_so_in_words_of_hers(visit):
    engine = FakeEngine("好。", pause=1.5)
    tab = visit(engine)
    say(tab, "早")
    wait_for_words(tab, "她正提笔……")
    assert not re.search(r"processing|queue|\d\.\ds", tab.inner_text("body"))
    wait_for_words(tab, "好。")


@once
def test_nothing_leaves_the_pages_own_origin_not_even_a_picture_in_a_reply(visit, browser):
    engine = FakeEngine("![](http://192.0.2.1/spy.png) 看这幅画 <img src='http://192.0.2.1/a.png'>")
    tab = visit(engine)
    asked, refused = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert not refused, "the page itself meets its policy"
    say(tab, "画一幅给我")
    wait_for_words(tab, "看这幅画")
    tab.wait_for_timeout(500)
    outside = [url for url in asked if not url.startswith((tab.url.rstrip("/"), "data:", "blob:"))]
    assert len(asked) > 20 and not outside and not refused
    assert not [url for url in asked if "font" in url]
    assert "<img" in words(tab)[-1], "her words are shown as they are"


CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_aa(visit, scheme):
    tab = visit(FakeEngine("臣妾甄嬛。"), color_scheme=scheme)
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    act(tab, "provenance")
    shoot(tab, scheme)
    assert tab.evaluate(CONTRAST) == []
    for opener in ("#place", "#open-talks", "#open-menu"):
        tab.click(opener)
        assert tab.evaluate(CONTRAST) == []
        tab.keyboard.press("Escape")
    for part in ("compare", "voice"):
        menu(tab, part)
        tab.wait_for_timeout(400)
        shoot(tab, f"{part}-{scheme}")
        assert tab.evaluate(CONTRAST) == []


RED = """() => [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()).flatMap((e) => {
  const style = getComputedStyle(e)
  return [style.color, style.backgroundColor, style.borderTopColor]
}).map((text) => text.match(/[\\d.]+/g).map(Number))
  .filter(([r, g, b, a = 1]) => a && r > 100 && r > 2 * g && r > 2 * b)
  .map((parts) => parts.slice(0, 3).join())"""


@once
def test_there_is_one_red(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    reds = set(tab.evaluate(RED))
    for part in ("compare", "voice"):
        menu(tab, part)
        tab.wait_for_timeout(300)
        reds |= set(tab.evaluate(RED))
    assert reds == {"140,28,43"}


def test_an_input_method_can_confirm_a_candidate_without_sending(visit):
    tab = visit(FakeEngine("好"))
    tab.click(BOX)
    keys = tab.context.new_cdp_session(tab)
    keys.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    keys.send(
        "Input.dispatchKeyEvent",
        {"type": "rawKeyDown", "windowsVirtualKeyCode": 229, "key": "Process", "code": "Enter"},
    )
    keys.send("Input.insertText", {"text": "你"})
    tab.wait_for_timeout(300)
    assert tab.input_value(BOX) == "你" and not words(tab, "user")
    tab.press(BOX, "Enter")
    wait_for_words(tab, "好")


def test_the_keyboard_alone_is_enough_and_replies_are_announced(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate(f"document.activeElement == document.querySelector('{BOX}')"):
            break
    tab.keyboard.type("早")
    tab.keyboard.press("Enter")
    wait_for_words(tab, "臣妾甄嬛。")
    log = tab.locator("[role=log][aria-live=polite]")
    assert log.count() == 1 and "臣妾甄嬛。" in log.inner_text()


@once
def test_the_page_can_be_put_on_a_home_screen(visit):
    tab = visit(FakeEngine("好"))
    manifest = tab.evaluate("fetch(document.querySelector('link[rel=manifest]').href).then(a => a.json())")
    assert manifest["name"] == "Chat-甄嬛" and manifest["display"] == "standalone"
    icon = tab.evaluate(f"fetch('{manifest['icons'][0]['src']}').then(a => a.text())")
    assert icon.startswith("<svg")


def test_lists_close_when_they_are_left_by_tab_and_focus_comes_back_on_escape(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    more = tab.locator(".actions.hers [data-action=more]")
    more.click()
    assert more.get_attribute("aria-expanded") == "true" and tab.locator(".dropdown").count() == 1
    for _ in range(8):
        tab.keyboard.press("Tab")
    assert tab.locator(".dropdown").count() == 0 and more.get_attribute("aria-expanded") == "false"
    more.click()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Escape")
    assert tab.locator(".dropdown").count() == 0
    assert tab.evaluate("document.activeElement.dataset.action") == "more"
    tab.click("#place")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#scenes") and tab.evaluate("document.activeElement.id") == "place"


FOCUS = """() => { const style = getComputedStyle(document.activeElement)
  return [document.activeElement.id || document.activeElement.dataset.action || document.activeElement.tagName,
    parseFloat(style.outlineWidth) > 0 && style.outlineStyle !== 'none' ||
    Boolean(document.activeElement.closest('#composer'))] }"""


@once
def test_focus_can_be_seen_wherever_it_is(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    tab.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(14):
        tab.keyboard.press("Tab")
        seen.append(tuple(tab.evaluate(FOCUS)))
    assert {"place", "open-talks", "open-menu", "talk", "again", "more"} <= {name for name, _ in seen}
    assert all(visible for name, visible in seen if name != "BODY")


@once
def test_print_gives_the_whole_talk_and_nothing_else(visit):
    tab = visit(FakeEngine(LONG))
    for question in ("一", "二", "三", "四", "五", "六"):
        say(tab, question)
        tab.locator("[data-testid=user]").get_by_text(question, exact=True).wait_for()
        wait_until_she_ended(tab)
    tab.emulate_media(media="print")
    talk = tab.evaluate(
        "(() => { const t = document.querySelector('#talk'); return [t.scrollHeight, t.clientHeight] })()"
    )
    assert talk[0] <= talk[1] + 1, "nothing is scrolled away"
    assert tab.evaluate("document.body.scrollHeight") >= talk[1] > 900
    assert (
        not tab.is_visible(BOX)
        and not tab.is_visible("#open-menu")
        and tab.locator(".actions button:visible").count() == 0
    )
    assert tab.is_visible("#bar h1") and tab.locator("#talk time:visible").count() == 12


@once
def test_text_that_runs_from_right_to_left_sits_right(visit):
    tab = visit(FakeEngine("مرحبا بك في القصر"))
    say(tab, "שלום, גברתי")
    wait_for_words(tab, "مرحبا")
    sides = tab.eval_on_selector_all(
        "[data-turn] .words", "all => all.map(getComputedStyle).map((style) => [style.direction, style.textAlign])"
    )
    assert sides == [["rtl", "start"]] * 2


@once
def test_chinese_is_set_with_room_between_its_lines_and_no_script_of_code_in_them(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    size, height, family = tab.eval_on_selector(
        ".words", "e => { const s = getComputedStyle(e); return [s.fontSize, s.lineHeight, s.fontFamily] }"
    )
    assert 1.7 <= float(height[:-2]) / float(size[:-2]) <= 1.8 and "Serif" in family and "mono" not in family


AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"


FAULTS = """axe.run().then(({violations}) =>
  violations.flatMap((each) => each.nodes.map((node) => `${each.id} ${node.html.slice(0, 120)}`)))"""


@pytest.mark.skipif(not AXE.exists(), reason="npm install --no-save axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_shuts_anybody_out(visit, scheme):
    tab = visit(FakeEngine("臣妾甄嬛。"), color_scheme=scheme)
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    wait_until_she_ended(tab)
    tab.evaluate(AXE.read_text(encoding="utf-8"))

    def faults():
        return tab.evaluate(FAULTS)

    assert faults() == []
    for opener in ("#place", "#open-talks", "#open-menu"):
        tab.click(opener)
        assert faults() == []
        tab.keyboard.press("Escape")
    for part in ("compare", "voice"):
        menu(tab, part)
        tab.wait_for_timeout(300)
        assert faults() == []
