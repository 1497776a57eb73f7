"""The page in a real browser, as a fan meets it. The engine is a fake: what is tested is the page."""

import os
import re
import time
from pathlib import Path

import pytest

import app
from chat import persona
from page import conversation
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
SHOTS = ROOT / "runs" / "screenshots"
PROVENANCE = conversation.PROVENANCE
WINDOWS = {
    1280: {"viewport": {"width": 1280, "height": 900}},
    390: {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
LONG = "昨夜落了一场雨，院里的海棠谢了大半，我叫槿汐扫了些花瓣收着，预备酿酒。" * 6


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


# Once is enough for what no window changes: the network, the API, what the server does.
once = pytest.mark.parametrize("visit", [1280], indirect=True)


@pytest.fixture(params=WINDOWS)
def visit(browser, request):
    """A function that opens the page for an engine, on a desktop and on a phone, and returns the tab."""
    opened = []

    def start(engine, path="", url=None, **window):
        if url is None:
            page = app.build_page(engine)
            _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
            opened.append(page)
        window = browser.new_context(**({"locale": "zh-CN"} | WINDOWS[request.param] | window))
        opened.insert(0, window)
        tab = window.new_page()
        tab.set_default_timeout(15_000)
        tab.goto(url + path)
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
    tab.screenshot(path=SHOTS / f"{name}-{tab.viewport_size['width']}.png")


def words(tab, who="bot"):
    """What stands in the bubbles, without the notes folded below them."""
    said = [bubble.inner_text().strip() for bubble in tab.query_selector_all(f"[data-testid={who}]")]
    return [each for each in said if not each.startswith(PROVENANCE)]


def wait_for_words(tab, text):
    tab.get_by_test_id("bot").filter(has_text=text).last.wait_for()


def test_she_greets_and_answers_and_the_box_is_free_again(visit):
    tab = visit(FakeEngine("臣妾甄嬛，见过这位贵客。", pause=0.02))
    assert persona.GREETING in words(tab)[0]
    shoot(tab, "greeting")
    say(tab, "你是谁？")
    wait_for_words(tab, "见过这位贵客。")
    assert words(tab, "user") == ["你是谁？"] and len(words(tab)) == 2
    assert tab.is_enabled("textarea:visible") and tab.input_value("textarea:visible") == ""
    shoot(tab, "answer")


# Where the masthead, the fields, the conversation, her first words and her picture stand: in the shell, in the page.
SHELL = ["#masthead h1", "#shell .stage", "#shell section", "#shell .hers", "#shell section svg"]
PAGE = ["#masthead h1", "#stage", "#talk", "#talk .message.bot", "#talk .avatar-container"]
PLACES = """parts => parts.map((part) => document.querySelector(part).getBoundingClientRect())
  .flatMap((box) => [box.x, box.y, box.width, box.height])"""


def before_gradio(tab, path=""):
    """Open the page as on a slow line: Gradio's scripts are on their way. Returns a function that lets them come."""
    scripts = "**/assets/*.js"
    tab.route(scripts, lambda _: None)
    tab.goto(tab.url.split("?")[0] + path, wait_until="commit")
    tab.wait_for_selector("#shell ~ gradio-app", state="attached")

    def come():
        tab.unroute(scripts)
        tab.wait_for_selector("[data-testid=bot]")

    return come


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_she_greets_before_gradio_comes_and_nothing_moves_when_it_does(visit, locale, scheme):
    tab = visit(FakeEngine("好"), locale=locale, color_scheme=scheme)
    come = before_gradio(tab)
    assert tab.inner_text("#shell .hers") == persona.GREETING and tab.is_visible("#shell[aria-busy=true]")
    assert tab.is_visible(f"#shell .box [lang={locale[:2]}]") and not tab.query_selector("[data-testid=bot]")
    assert tab.evaluate(CONTRAST) == [] and tab.evaluate("document.body.matches('.dark')") == (scheme == "dark")
    shoot(tab, f"shell-{locale}-{scheme}")
    there = tab.evaluate(PLACES, SHELL)
    come()
    assert not tab.query_selector("#shell") and tab.locator("#masthead").count() == 1
    wait_until(lambda: tab.evaluate(PLACES, PAGE) == pytest.approx(there, abs=1))


@once
def test_who_comes_back_to_a_talk_or_by_a_link_is_not_greeted_first(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    come = before_gradio(tab, "?q=早&scene=太后")
    assert tab.inner_text("#shell .hers") == "……"
    come()
    wait_until(lambda: tab.input_value("textarea:visible") == "早")
    tab.press("textarea:visible", "Enter")
    wait_until(lambda: tab.evaluate("zhenhuan.last().includes('臣妾甄嬛。')"))
    come = before_gradio(tab)
    assert tab.inner_text("#shell .hers") == "……"
    come()
    wait_for_words(tab, "臣妾甄嬛。")
    tab.get_by_label("清空对话").click()
    wait_until(lambda: not words(tab, "user"))
    before_gradio(tab)
    assert tab.inner_text("#shell .hers") == persona.GREETING


@once
def test_the_first_greeting_makes_way_even_without_its_script(visit):
    tab = visit(FakeEngine("好"))
    markup = app.SHELL.template.partition("<script>")[0]
    tab.evaluate("markup => document.body.insertAdjacentHTML('afterbegin', markup)", markup)
    assert tab.query_selector("#shell") and not tab.is_visible("#shell")


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
    wait_until(lambda: tab.get_attribute("textarea:visible", "placeholder") == "对她说些什么……")
    assert not failed


@pytest.mark.parametrize("way", ["opener", "edit"])
def test_stop_is_offered_however_she_was_asked(visit, way):
    engine = FakeEngine("头一回。", LONG, "再说别的。", pause=0.05) if way == "edit" else FakeEngine(LONG, pause=0.05)
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


def test_retry_undo_and_clear(visit):
    engine = FakeEngine("头一回。", "第二回。")
    tab = visit(engine)
    say(tab, "再说一遍")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("重试").click()
    wait_for_words(tab, "第二回。")
    assert [m["content"] for m in engine.asked[1][0]] == ["再说一遍"]
    tab.get_by_label("撤销").click()
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    assert tab.input_value("textarea:visible") == "再说一遍"
    say(tab, "再说一遍")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("清空对话").click()
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    wait_for_words(tab, persona.GREETING[:8])


def test_an_edited_question_is_answered_anew(visit):
    engine = FakeEngine("头一回。", "改后的回话。")
    tab = visit(engine)
    say(tab, "早")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("编辑").last.click()
    tab.locator(".message-wrap textarea").first.fill("晚安")
    tab.get_by_label("发送").click()
    wait_for_words(tab, "改后的回话。")
    assert engine.asked[1][0][-1]["content"] == "晚安"


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
    wide, high = tab.viewport_size.values()
    box = tab.locator("textarea:visible").bounding_box()
    assert box["y"] + box["height"] <= high, "the text box is off the screen"
    assert tab.evaluate(FIT, LOWEST[wide]) == []
    say(tab, "讲讲昨夜")
    wait_for_words(tab, LONG[-12:])
    tab.click("#revise")
    for drawer in tab.locator("button.label-wrap").all():
        drawer.click()
    tab.wait_for_timeout(600)
    assert tab.evaluate(FIT, LOWEST[wide]) == []
    tab.get_by_role("tab").last.click()
    tab.wait_for_timeout(600)
    assert tab.evaluate(FIT, LOWEST[wide]) == []


def pick(tab, number, text):
    """Choose an entry of the scene's (0) or the visitor's (1) list."""
    tab.locator("#stage input").nth(number).click()
    tab.get_by_role("option", name=text).click()


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_scene_has_its_own_opening_and_is_told_to_her_with_who_is_there(visit):
    engine = FakeEngine("山里的月色，比宫里的清。")
    tab = visit(engine)
    pick(tab, 0, "甘露寺")
    wait_for_words(tab, persona.scene_named("甘露寺").greeting[:8])
    assert "莫愁" in tab.inner_text("#setting")
    pick(tab, 1, "果郡王")
    say(tab, "近来可好？")
    wait_for_words(tab, "比宫里的清。")
    assert engine.asked[0][0] == [{"role": "user", "content": "（甘露寺·果郡王）近来可好？"}]
    assert words(tab, "user") == ["近来可好？"]
    shoot(tab, "scene")
    tab.get_by_label("清空对话").click()
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    wait_for_words(tab, persona.scene_named("甘露寺").greeting[:8])


def test_each_scene_keeps_its_own_conversation(visit):
    tab = visit(FakeEngine("此间的话。", "彼处的话。"))
    say(tab, "早")
    wait_for_words(tab, "此间的话。")
    pick(tab, 0, "太后")
    wait_for_words(tab, persona.scene_named("太后").greeting[:8])
    say(tab, "晚")
    wait_for_words(tab, "彼处的话。")
    pick(tab, 0, "永寿宫")
    wait_for_words(tab, "此间的话。")
    assert words(tab, "user") == ["早"]


def test_retry_keeps_the_earlier_reply_to_leaf_back_to(visit):
    engine = FakeEngine("头一回。", "第二回。", "第三句。")
    tab = visit(engine)
    say(tab, "再说一遍")
    wait_for_words(tab, "头一回。")
    tab.get_by_label("重试").click()
    wait_for_words(tab, "第二回。")
    tab.wait_for_function("document.querySelector('#counter').innerText.trim() == '2 / 2'")
    tab.get_by_role("button", name="上一种").click()
    wait_for_words(tab, "头一回。")
    assert words(tab)[-1] == "头一回。"
    say(tab, "好")
    wait_for_words(tab, "第三句。")
    assert [m["content"] for m in engine.asked[2][0]] == ["再说一遍", "头一回。", "好"]


def test_her_reply_can_be_rewritten_and_she_goes_on_from_it(visit):
    engine = FakeEngine("本宫不喜杏花。", "最喜欢的。")
    tab = visit(engine)
    say(tab, "你喜欢什么花？")
    wait_for_words(tab, "本宫不喜杏花。")
    tab.click("#revise")
    tab.fill("#revised textarea", "本宫喜欢杏花，")
    tab.get_by_role("button", name="改好了").click()
    wait_for_words(tab, "本宫喜欢杏花，")
    tab.click("#go_on")
    wait_for_words(tab, "本宫喜欢杏花，最喜欢的。")
    assert engine.asked[1][0][-1] == {"role": "assistant", "content": "本宫喜欢杏花，"}
    assert words(tab)[-1] == "本宫喜欢杏花，最喜欢的。" and len(words(tab, "user")) == 1


def test_a_line_can_be_suggested_and_sent(visit):
    engine = FakeEngine("娘娘今日气色真好。", "你倒会说话。")
    tab = visit(engine)
    tab.click("#suggest")
    tab.wait_for_function("document.querySelector('textarea').value == '娘娘今日气色真好。'")
    assert engine.asked[0][:2] == ([{"role": "user", "content": ""}], "base")
    wait_until(lambda: tab.is_visible("button.submit-button"))
    tab.press("textarea:visible", "Enter")
    wait_for_words(tab, "你倒会说话。")
    assert words(tab, "user") == ["娘娘今日气色真好。"]


def test_two_replies_side_by_side_are_blind_until_the_vote(visit):
    tab = visit(FakeEngine("左边的话。", "右边的话。"))
    tab.get_by_role("tab", name="并排").click()
    tab.fill("#asked textarea", "你是谁？")
    tab.click("#ask")
    tab.wait_for_function("document.querySelector('#right').innerText.includes('右边的话。')")
    tab.wait_for_selector("#vote-left:not([disabled])")
    shoot(tab, "compare")
    assert "scripted" not in tab.inner_text("#left") + tab.inner_text("#right") + tab.inner_text("#verdict")
    tab.click("#vote-left")
    tab.wait_for_function("document.querySelector('#verdict').innerText.includes('scripted')")
    verdict = tab.inner_text("#verdict")
    left = re.search(r"Left: (\w+)", verdict).group(1)
    assert ("adapter 1" in verdict) == (left == "scripted") and tab.is_disabled("#vote-left")


def test_a_conversation_outlives_reload_and_server_restart(visit):
    def serve(engine, port=None):
        page = app.build_page(engine)
        _, url, _ = page.launch(server_port=port, prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        return page, url

    page, url = serve(FakeEngine("我记着呢。"))
    tab = visit(None, url=url)
    say(tab, "我叫小林")
    wait_for_words(tab, "我记着呢。")
    tab.wait_for_timeout(300)
    tab.reload()
    wait_for_words(tab, "我记着呢。")
    page.close()
    engine = FakeEngine("你叫小林。")
    page, _ = serve(engine, int(url.rstrip("/").rsplit(":", 1)[1]))
    tab.reload()
    wait_for_words(tab, "我记着呢。")
    say(tab, "我叫什么？")
    wait_for_words(tab, "你叫小林。")
    assert [m["content"] for m in engine.asked[0][0]] == ["我叫小林", "我记着呢。", "我叫什么？"]
    page.close()


def test_exports_are_whole_and_come_back(visit, tmp_path):
    tab = visit(FakeEngine("臣妾记下了。"))
    say(tab, "我叫小林")
    wait_for_words(tab, "臣妾记下了。")
    tab.locator("#drawer button").first.click()
    files = {}
    for form in ("Markdown", "JSON", "ShareGPT"):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=f"存为 {form}").click()
        files[form] = tmp_path / form
        download.value.save_as(files[form])
    assert "**甄嬛**：臣妾记下了。" in files["Markdown"].read_text(encoding="utf-8")
    from training.data import load

    named = files["ShareGPT"].rename(tmp_path / "said.json")
    (example,) = load([str(named)])
    assert (example.question, example.answer) == ("我叫小林", "臣妾记下了。")
    tab.get_by_role("button", name="全部抹去").click()
    tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    tab.reload()
    wait_for_words(tab, persona.GREETING[:8])
    assert (
        not words(tab, "user")
        and tab.evaluate("Object.keys(localStorage).filter(k => k.startsWith('zhenhuan/')).length") == 0
    )
    tab.locator("#drawer button").first.click()
    with tab.expect_file_chooser() as chooser:
        tab.click("#import")
    chooser.value.set_files(files["JSON"])
    wait_for_words(tab, "臣妾记下了。")
    assert words(tab, "user") == ["我叫小林"]


def test_a_file_that_is_no_transcript_gets_a_sentence(visit, tmp_path):
    tab = visit(FakeEngine("好"))
    (tmp_path / "odd.json").write_text("[1, 2]")
    tab.locator("#drawer button").first.click()
    with tab.expect_file_chooser() as chooser:
        tab.click("#import")
    chooser.value.set_files(tmp_path / "odd.json")
    tab.wait_for_function("document.querySelector('#status').innerText.includes('读不懂')")
    assert persona.GREETING in words(tab)[0]


def test_the_note_below_a_reply_tells_how_to_have_it_again(visit):
    engine = FakeEngine("臣妾甄嬛。")
    tab = visit(engine)
    pick(tab, 0, "甘露寺")
    wait_for_words(tab, persona.scene_named("甘露寺").greeting[:8])
    say(tab, "你是谁？")
    wait_for_words(tab, "臣妾甄嬛。")
    tab.get_by_text(PROVENANCE).click()
    facts = tab.get_by_test_id("bot").last.inner_text()
    seed = engine.asked[0][2].seed
    assert f"种子 Seed: {seed}" in facts and "sha256 0123abcd" in facts and "自己说完" in facts
    shoot(tab, "provenance")
    address = tab.get_by_text("同样的一问").get_attribute("href")
    again = visit(engine, url=tab.url.split("?")[0].rstrip("/"), path=f"/{address}")
    wait_until(lambda: again.input_value("textarea:visible") == "你是谁？")
    again.press("textarea:visible", "Enter")
    wait_for_words(again, "臣妾甄嬛。")
    assert engine.asked[1] == engine.asked[0]


def test_those_who_wait_are_told_their_place(visit):
    engine = FakeEngine("慢慢说来，不必着急，喝口茶。", pause=0.2)
    first = visit(engine)
    second = visit(engine, url=first.url)
    say(first, "早")
    wait_until(lambda: engine.running)
    say(second, "早")
    wait_for_words(second, "前面还有 1 位")
    shoot(second, "waiting")
    wait_for_words(second, "喝口茶。")
    assert engine.peak == 1 and "前面还有" not in words(second)[-1]


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
    tab.get_by_role("tab", name="并排").click()
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
    assert "模型正在装载" in words(tab)[-1] and not engine.asked
    shoot(tab, "loading")
    engine.ready = True
    wait_for_words(tab, "让你久等了。")
    assert words(tab)[-1] == "让你久等了。" and len(words(tab)) == 2
    assert tab.is_enabled("textarea:visible")


LATIN = re.compile(r"[A-Za-z]{3,}")
NAMES = {"Chat", "Markdown", "JSON", "ShareGPT", "top", "token"}
LABELS = """[...document.querySelectorAll('body *:not(svg)')].flatMap(e => [
  ...['aria-label', 'title', 'placeholder', 'alt'].map(name => e.getAttribute(name)),
  ...(e.matches('button, label span, [role=tab], #setting p') ? [e.innerText] : [])]).filter(Boolean)"""


@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_the_page_speaks_the_visitors_language(visit, locale):
    tab = visit(FakeEngine("臣妾甄嬛。"), locale=locale)
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    for drawer in tab.locator("button.label-wrap").all():
        drawer.click()
    shoot(tab, f"language-{locale}")
    labels = [label.strip() for label in tab.evaluate(LABELS) if PROVENANCE not in label and "Seed" not in label]
    assert not [label for label in labels if "__i18n__" in label or "chat_interface" in label]
    assert tab.is_visible("#masthead p.english" if locale == "en-US" else "#masthead p:not(.english)")
    if locale == "zh-CN":
        assert not [label for label in labels if set(LATIN.findall(label)) - NAMES]
    else:
        wanted = {"Send", "Continue", "Suggest my line", "Edit her reply", "Who you are to her", "Side by side"}
        assert wanted <= set(labels) and "甄嬛, Noble Consort Xi, 26 years old" in labels


@once
def test_nothing_leaves_the_pages_own_origin_not_even_a_picture_in_a_reply(visit, browser):
    engine = FakeEngine("![](http://192.0.2.1/spy.png) 看这幅画 <img src='http://192.0.2.1/a.png'>")
    tab = visit(engine, url=None)
    asked, refused = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
    tab.reload()
    tab.wait_for_selector("[data-testid=bot]")
    assert not refused, "the page itself meets its policy"
    say(tab, "画一幅给我")
    wait_for_words(tab, "看这幅画")
    tab.wait_for_timeout(500)
    outside = [url for url in asked if not url.startswith((tab.url.rstrip("/"), "data:", "blob:"))]
    assert len(asked) > 20 and not [url for url in outside if "192.0.2.1" not in url]
    assert not [url for url in asked if "font" in url]
    assert len(refused) >= len(outside), "what her words asked for is refused before it leaves"


CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_aa(visit, scheme):
    tab = visit(FakeEngine("臣妾甄嬛。"), color_scheme=scheme)
    say(tab, "早")
    wait_for_words(tab, "臣妾甄嬛。")
    for drawer in tab.locator("button.label-wrap").all():
        drawer.click()
    tab.wait_for_timeout(600)
    shoot(tab, scheme)
    assert tab.evaluate(CONTRAST) == []
    tab.get_by_role("tab", name="并排").click()
    tab.wait_for_timeout(600)
    assert tab.evaluate(CONTRAST) == []


def test_an_input_method_can_confirm_a_candidate_without_sending(visit):
    tab = visit(FakeEngine("好"))
    tab.click("textarea:visible")
    keys = tab.context.new_cdp_session(tab)
    keys.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    keys.send(
        "Input.dispatchKeyEvent",
        {"type": "rawKeyDown", "windowsVirtualKeyCode": 229, "key": "Process", "code": "Enter"},
    )
    keys.send("Input.insertText", {"text": "你"})
    tab.wait_for_timeout(300)
    assert tab.input_value("textarea:visible") == "你" and not words(tab, "user")
    tab.press("textarea:visible", "Enter")
    wait_for_words(tab, "好")


def test_the_keyboard_alone_is_enough_and_replies_are_announced(visit):
    tab = visit(FakeEngine("臣妾甄嬛。"))
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.tagName == 'TEXTAREA'"):
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
