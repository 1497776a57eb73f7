"""Nothing that a visitor said, or she answered, is lost. The engine is a fake."""

import json

import pytest

import app
from chat import persona
from tests.e2e.steps import (
    BOX,
    LONG,
    act,
    enter,
    kept,
    menu,
    open_talk,
    say,
    shoot,
    titles,
    wait_for_words,
    wait_until,
    wait_until_she_ended,
    words,
)  # fmt: skip
from tests.fake_engine import FakeEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def ask(tab, question, answer):
    say(tab, question)
    wait_for_words(tab, answer)
    wait_until_she_ended(tab)


def test_a_reply_goes_into_the_talk_it_was_asked_in_whichever_is_in_view(visit):
    engine = FakeEngine("此间的话，" * 12, "彼处的话。", pause=0.05)
    tab = visit(engine)
    say(tab, "早")
    wait_for_words(tab, "此间的话")
    enter(tab, "太后")
    wait_for_words(tab, persona.scene_named("太后").greeting[:8])
    wait_until(lambda: not engine.running)
    wait_until_she_ended(tab)
    assert words(tab) == [persona.scene_named("太后").greeting] and not words(tab, "user")
    ask(tab, "晚", "彼处的话。")
    open_talk(tab, "早")
    assert words(tab)[1:] == ["此间的话，" * 12] and words(tab, "user") == ["早"]
    assert [talk["scene"] for talk in sorted(kept(tab), key=lambda talk: talk["created"])] == ["永寿宫", "太后"]


def test_a_link_opens_a_talk_of_its_own_and_leaves_the_address(visit):
    engine = FakeEngine("头一回。", "第二回。")
    tab = visit(engine)
    ask(tab, "早", "头一回。")
    home = tab.url
    tab.goto(f"{home}?scene=甘露寺&visitor=果郡王&temperature=0.9&adapter=scripted&seed=7&q=你是谁？")
    tab.wait_for_selector("body[data-ready]")
    wait_until(lambda: tab.input_value(BOX) == "你是谁？")
    assert tab.url == home and not words(tab, "user")
    tab.press(BOX, "Enter")
    wait_for_words(tab, "第二回。")
    messages, adapter, sampling = engine.asked[1]
    assert messages[-1]["content"] == "（甘露寺·果郡王）你是谁？"
    assert (adapter, sampling.seed, sampling.temperature) == ("scripted", 7, 0.9)
    wait_until_she_ended(tab)
    tab.reload()
    wait_for_words(tab, "第二回。")
    assert tab.input_value(BOX) == "" and sorted(titles(tab)) == ["你是谁？", "早"]


@pytest.mark.parametrize("forged", ["scene=冷宫", "visitor=华妃&scene=太后", "temperature=99", "seed=x", "top_k=-3"])
def test_a_link_that_the_page_could_not_have_made_is_left_aside_with_a_sentence(visit, forged):
    tab = visit(FakeEngine("好"), path=f"?{forged}&q=早")
    tab.locator("#notice", has_text="这个链接里有本页没有的东西").wait_for()
    assert tab.input_value(BOX) == "" and "q=" not in tab.url


def test_two_tabs_of_one_talk_lose_no_turn(visit):
    tab = visit(FakeEngine("一。", "二。", "三。"))
    ask(tab, "甲", "一。")
    other = visit(beside=tab)
    wait_for_words(other, "一。")
    ask(other, "乙", "二。")
    wait_for_words(tab, "二。")
    ask(tab, "丙", "三。")
    wait_for_words(other, "三。")
    assert words(tab, "user") == words(other, "user") == ["甲", "乙", "丙"]
    (talk,) = kept(tab)
    assert [turn["question"] for turn in talk["turns"]] == ["甲", "乙", "丙"]


def test_two_tabs_that_ask_at_once_each_keep_their_turn(visit):
    tab = visit(FakeEngine("一。", "慢慢说来，不必着急，喝口茶。", "三。", pause=0.1))
    ask(tab, "甲", "一。")
    other = visit(beside=tab)
    wait_for_words(other, "一。")
    say(other, "乙")
    wait_for_words(other, "慢慢")
    wait_for_words(tab, "慢慢")
    say(tab, "丙")
    wait_for_words(tab, "三。")
    wait_for_words(other, "喝口茶。")
    wait_until(lambda: all(turn["replies"][0]["state"] == "done" for talk in kept(tab) for turn in talk["turns"]))
    asked = sorted([turn["question"] for turn in talk["turns"]] for talk in kept(tab))
    assert asked == [["甲", "丙"], ["甲", "乙"]]


@pytest.mark.parametrize(("locale", "said"), [("zh-CN", "线断了。话已放回"), ("en-US", "You are offline")])
def test_a_question_asked_without_a_line_comes_back_into_the_box_and_goes_out_when_it_is_back(visit, locale, said):
    tab = visit(FakeEngine("听见了。"), locale=locale)
    tab.context.set_offline(True)
    say(tab, "你是谁？")
    tab.locator("#notice", has_text=said).wait_for()
    wait_until(lambda: tab.input_value(BOX) == "你是谁？")
    assert not words(tab, "user")
    shoot(tab, f"offline-{locale}")
    tab.context.set_offline(False)
    wait_for_words(tab, "听见了。")
    assert words(tab, "user") == ["你是谁？"] and tab.input_value(BOX) == ""


def test_half_a_reply_is_kept_when_the_line_breaks_and_she_is_asked_again_when_it_is_back(visit):
    tab = visit(FakeEngine(LONG, "再说一回。", pause=0.05))
    say(tab, "讲讲昨夜")
    wait_for_words(tab, "昨夜落了一场雨")
    tab.context.set_offline(True)
    tab.locator("#notice", has_text="说了一半的话留着").wait_for()
    wait_until_she_ended(tab)
    half = words(tab)[1]
    assert LONG.startswith(half) and len(half) < len(LONG) and words(tab, "user") == ["讲讲昨夜"]
    tab.context.set_offline(False)
    wait_for_words(tab, "再说一回。")
    wait_until_she_ended(tab)
    act(tab, "earlier")
    wait_for_words(tab, "昨夜落了一场雨")
    assert words(tab)[1] == half


def test_a_reload_in_mid_reply_goes_on_with_the_question_and_keeps_what_she_had_said(visit):
    tab = visit(FakeEngine(LONG, "接着说的话。", pause=0.05))
    say(tab, "讲讲昨夜")
    wait_for_words(tab, "昨夜落了一场雨，院里的海棠谢了大半，我叫槿汐")
    tab.reload()
    wait_for_words(tab, "接着说的话。")
    wait_until_she_ended(tab)
    assert words(tab, "user") == ["讲讲昨夜"]
    act(tab, "earlier")
    wait_for_words(tab, "昨夜落了一场雨")


def test_scene_visitor_sampling_and_earlier_replies_outlive_a_reload(visit):
    engine = FakeEngine("头一回。", "第二回。", "第三句。")
    tab = visit(engine)
    enter(tab, "甘露寺", "果郡王")
    menu(tab, "voice")
    tab.locator("#voice input[type=number]").first.fill("1.3")
    tab.locator("#voice input[type=number]").first.press("Tab")
    tab.click("#back")
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert "甘露寺" in tab.inner_text("#place") and "果郡王" in tab.inner_text("#place")
    ask(tab, "可好？", "头一回。")
    act(tab, "again")
    wait_for_words(tab, "第二回。")
    wait_until_she_ended(tab)
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    wait_for_words(tab, "第二回。")
    assert tab.inner_text(".actions.hers .count") == "2 / 2"
    ask(tab, "当真？", "第三句。")
    assert engine.asked[2][0][0]["content"] == "（甘露寺·果郡王）可好？"
    assert [sampling.temperature for _, _, sampling in engine.asked] == [1.3] * 3


def test_editing_a_question_leaves_what_was_said_in_the_old_talk(visit):
    engine = FakeEngine("头一回。", "后来的话。", "改后的回话。")
    tab = visit(engine)
    ask(tab, "早", "头一回。")
    ask(tab, "晚", "后来的话。")
    tab.reload()
    wait_for_words(tab, "后来的话。")
    tab.wait_for_selector("body[data-ready]")
    act(tab, "edit", 0, "yours")
    tab.fill(".editor textarea", "早安")
    tab.click(".editor .primary")
    wait_for_words(tab, "改后的回话。")
    assert words(tab, "user") == ["早安"] and [m["content"] for m in engine.asked[2][0]] == ["早安"]
    wait_until_she_ended(tab)
    open_talk(tab, "早")
    wait_for_words(tab, "后来的话。")
    assert words(tab, "user") == ["早", "晚"] and words(tab)[1:] == ["头一回。", "后来的话。"]


def test_talks_are_named_by_their_first_line_and_can_be_sought_renamed_and_deleted(visit):
    tab = visit(FakeEngine("海棠开了。", "下雪了。"))
    ask(tab, "春天如何？", "海棠开了。")
    tab.click("#open-talks")
    tab.click("#talks [data-new]")
    ask(tab, "冬天如何？", "下雪了。")
    assert titles(tab) == ["冬天如何？", "春天如何？"]
    shoot(tab, "talks")
    tab.fill("#talks input[type=search]", "海棠")
    assert titles(tab) == ["春天如何？"]
    tab.fill("#talks input[type=search]", "没有的话")
    assert tab.inner_text("#talks .empty") == "没有找到。"
    tab.fill("#talks input[type=search]", "")
    first = tab.locator("#talks li").first
    first.locator("[data-action=more]").click()
    first.locator("[data-action=rename]").click()
    tab.fill("#talks .rename input", "雪夜")
    tab.press("#talks .rename input", "Enter")
    wait_until(lambda: titles(tab) == ["雪夜", "春天如何？"])
    tab.locator("#talks li").first.locator("[data-action=more]").click()
    tab.locator("#talks [data-action=delete]").click()
    wait_until(lambda: titles(tab) == ["春天如何？"])
    tab.click("#talks .undo button")
    wait_until(lambda: titles(tab) == ["雪夜", "春天如何？"])
    tab.locator("#talks li").first.locator("[data-action=more]").click()
    tab.locator("#talks [data-action=delete]").click()
    wait_until(lambda: titles(tab) == ["春天如何？"])
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert titles(tab) == ["春天如何？"]
    tab.click("#talks [data-part=trash]")
    tab.get_by_role("button", name="取回", exact=True).click()
    tab.click("#talks [data-part=talks]")
    assert titles(tab) == ["雪夜", "春天如何？"]
    tab.locator("#talks li").first.locator("[data-action=more]").click()
    tab.locator("#talks [data-action=delete]").click()
    tab.click("#talks [data-part=trash]")
    tab.get_by_role("button", name="永远删去").click()
    wait_until(lambda: [talk["turns"][0]["question"] for talk in kept(tab)] == ["春天如何？"])


def test_a_draft_stays_with_its_talk(visit):
    tab = visit(FakeEngine("好。"))
    ask(tab, "早", "好。")
    tab.type(BOX, "写了一半")
    tab.click("#open-talks")
    tab.click("#talks [data-new]")
    wait_until(lambda: tab.input_value(BOX) == "")
    tab.type(BOX, "另一句")
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    wait_until(lambda: tab.input_value(BOX) == "另一句")
    open_talk(tab, "早")
    wait_until(lambda: tab.input_value(BOX) == "写了一半")
    open_talk(tab, "另一句")
    wait_until(lambda: tab.input_value(BOX) == "另一句" and not words(tab, "user"))
    open_talk(tab, "早")
    wait_until(lambda: tab.input_value(BOX) == "写了一半")
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    wait_until(lambda: tab.input_value(BOX) == "写了一半")


def test_deleting_everything_empties_the_browser_and_can_be_undone(visit):
    tab = visit(FakeEngine("一。", "二。"))
    ask(tab, "甲", "一。")
    enter(tab, "太后")
    ask(tab, "乙", "二。")
    tab.type(BOX, "甲的草稿")
    menu(tab, "forget")
    tab.locator("#notice", has_text="已全部抹去").wait_for()
    assert kept(tab) == [] and words(tab, "user") == [] and tab.input_value(BOX) == ""
    assert "甲" not in tab.evaluate("JSON.stringify([localStorage, sessionStorage])")
    tab.click("#notice button")
    wait_until(lambda: len(kept(tab)) == 2)
    assert sorted(titles(tab)) == ["乙", "甲"]
    tab.keyboard.press("Escape")
    menu(tab, "forget")
    wait_until(lambda: kept(tab) == [])
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert titles(tab) == [] and not words(tab, "user")


OLD = {
    "scene": "甘露寺", "visitor": "果郡王",
    "messages": [
        {"role": "assistant", "content": [{"type": "text", "text": "山里清静。"}]},
        {"role": "user", "content": [{"type": "text", "text": "近来可好？"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "尚可。\n\n〔提示〕"}]},
        {"role": "assistant", "content": "种子 Seed: 5", "metadata": {"title": "来历 · Provenance"}},
    ],
}  # fmt: skip


def test_talks_of_an_earlier_build_are_adopted(visit):
    old = json.dumps(json.dumps(OLD))
    init = f"""if (!sessionStorage.adopted) {{
      sessionStorage.adopted = 1
      localStorage['zhenhuan/甘露寺'] = {old}
      localStorage.zhenhuan = '甘露寺'
    }}"""
    tab = visit(FakeEngine("好。"), init=init)
    wait_for_words(tab, "尚可。")
    assert words(tab, "user") == ["近来可好？"] and "甘露寺" in tab.inner_text("#place")
    assert not tab.evaluate("localStorage.getItem('zhenhuan/甘露寺')")
    tab.reload()
    wait_for_words(tab, "尚可。")
    assert len(kept(tab)) == 1


REFUSED = """
for (const name of ['indexedDB', 'localStorage', 'sessionStorage'])
  Object.defineProperty(window, name, { configurable: true, get() { throw new DOMException('no', 'SecurityError') } })
"""


def test_a_browser_that_refuses_storage_can_talk_all_the_same(visit):
    tab = visit(FakeEngine("一。", "二。"), init=REFUSED)
    tab.locator("#notice", has_text="浏览器不让存").wait_for()
    ask(tab, "甲", "一。")
    ask(tab, "乙", "二。")
    assert words(tab, "user") == ["甲", "乙"] and titles(tab) == ["甲"]


def test_a_talk_outlives_reload_and_server_restart(visit):
    def serve(engine, port=None):
        page = app.build_page(engine)
        _, url, _ = page.launch(server_port=port, prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        return page, url

    page, url = serve(FakeEngine("我记着呢。"))
    tab = visit(url=url)
    ask(tab, "我叫小林", "我记着呢。")
    page.close()
    engine = FakeEngine("你叫小林。")
    page, _ = serve(engine, int(url.rstrip("/").rsplit(":", 1)[1]))
    tab.reload()
    wait_for_words(tab, "我记着呢。")
    ask(tab, "我叫什么？", "你叫小林。")
    assert [m["content"] for m in engine.asked[0][0]] == ["我叫小林", "我记着呢。", "我叫什么？"]
    page.close()


def test_a_server_that_is_gone_gives_the_question_back(visit):
    page = app.build_page(FakeEngine("好"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    tab = visit(url=url)
    page.close()
    say(tab, "还在么？")
    wait_until(lambda: tab.input_value(BOX) == "还在么？" and tab.inner_text("#notice"))
    assert not words(tab, "user")


def test_a_branch_begins_at_any_reply_and_leaves_the_old_talk(visit):
    engine = FakeEngine("一。", "二。", "三。")
    tab = visit(engine)
    ask(tab, "甲", "一。")
    ask(tab, "乙", "二。")
    act(tab, "branch", 0)
    wait_until(lambda: words(tab, "user") == ["甲"])
    ask(tab, "丙", "三。")
    assert [m["content"] for m in engine.asked[2][0]] == ["甲", "一。", "丙"]
    assert sorted([turn["question"] for turn in talk["turns"]] for talk in kept(tab)) == [["甲", "丙"], ["甲", "乙"]]


def test_any_line_of_hers_can_be_reworded_and_she_goes_on_from_it(visit):
    engine = FakeEngine("本宫不喜杏花。", "后来的话。", "最后的话。")
    tab = visit(engine)
    ask(tab, "你喜欢什么花？", "本宫不喜杏花。")
    ask(tab, "当真？", "后来的话。")
    act(tab, "edit", 0)
    tab.fill(".editor textarea", "本宫喜欢杏花。")
    tab.click(".editor .primary")
    wait_for_words(tab, "本宫喜欢杏花。")
    assert words(tab)[1:] == ["本宫喜欢杏花。", "后来的话。"]
    ask(tab, "再说", "最后的话。")
    assert engine.asked[2][0][1]["content"] == "本宫喜欢杏花。"
    act(tab, "earlier", 0)
    wait_until(lambda: words(tab)[1] == "本宫不喜杏花。")


def test_moments_are_kept_and_found_again(visit):
    tab = visit(FakeEngine("海棠开了。", "下雪了。"))
    ask(tab, "春天如何？", "海棠开了。")
    act(tab, "pin")
    tab.wait_for_selector("[data-action=pin][aria-pressed=true]")
    enter(tab, "太后")
    ask(tab, "冬天如何？", "下雪了。")
    menu(tab, "moments")
    shoot(tab, "moments")
    assert titles(tab) == ["海棠开了。"]
    tab.locator("#talks .moment").click()
    wait_for_words(tab, "海棠开了。")
    assert "永寿宫" in tab.inner_text("#place")
    act(tab, "pin")
    menu(tab, "moments")
    assert "还没有珍藏" in tab.inner_text("#talks .empty")


def test_each_message_has_its_time(visit):
    tab = visit(FakeEngine("好。"), init="Date.now = () => Date.UTC(2026, 10, 30, 13, 5)")
    ask(tab, "早", "好。")
    times = tab.eval_on_selector_all("#talk time", "all => all.map(each => [each.innerText, each.dateTime])")
    assert times == [["21:05", "2026-11-30T13:05:00.000Z"]] * 2


def test_exports_are_whole_and_come_back(visit, tmp_path):
    tab = visit(FakeEngine("臣妾记下了。"))
    enter(tab, "甘露寺", "果郡王")
    ask(tab, "我叫小林", "臣妾记下了。")
    files = {}
    for form in ("md", "json", "sharegpt", "messages"):
        with tab.expect_download() as download:
            menu(tab, f"export_{form}")
        files[form] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[form])
    assert "**果郡王**：我叫小林\n\n**甄嬛**：臣妾记下了。" in files["md"].read_text(encoding="utf-8")
    from training.data import load

    for form in ("sharegpt", "messages"):
        (example,) = load([str(files[form])])
        assert (example.question, example.answer) == ("（甘露寺·果郡王）我叫小林", "臣妾记下了。")
    for form in ("json", "sharegpt", "messages"):
        menu(tab, "forget")
        wait_until(lambda: kept(tab) == [])
        with tab.expect_file_chooser() as chooser:
            menu(tab, "import")
        chooser.value.set_files(files[form])
        wait_for_words(tab, "臣妾记下了。")
        assert words(tab, "user") == ["我叫小林"] and "果郡王" in tab.inner_text("#place")


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "nonsense", '{"turns": [{"question": 1}]}', '{"scene": "冷宫", "turns": []}', '{"messages": []}',
     '{"scene": "太后", "visitor": "皇上", "messages": [{"role": "user", "content": "早"}]}'],
)  # fmt: skip
def test_a_file_that_is_no_transcript_gets_a_sentence(visit, tmp_path, text):
    tab = visit(FakeEngine("好"))
    (tmp_path / "odd.json").write_text(text, encoding="utf-8")
    with tab.expect_file_chooser() as chooser:
        menu(tab, "import")
    chooser.value.set_files(tmp_path / "odd.json")
    tab.locator("#notice", has_text="读不懂").wait_for()
    assert kept(tab) == []


def test_a_forged_file_brings_no_markup_of_its_own(visit, tmp_path):
    tab = visit(FakeEngine("好"))
    evil = "<img src=x onerror='document.title=1'>"
    reply = {"text": evil, "facts": {"finish_reason": "stop", "adapter": evil, "link": "javascript:1", "more": evil}}
    turns = [{"question": evil, "replies": [reply, *[{"text": "再"}] * 50], "at": 0}]
    (tmp_path / "evil.json").write_text(json.dumps({"turns": turns, "title": evil * 9}), encoding="utf-8")
    with tab.expect_file_chooser() as chooser:
        menu(tab, "import")
    chooser.value.set_files(tmp_path / "evil.json")
    wait_for_words(tab, "onerror")
    act(tab, "provenance")
    tab.click("#open-talks")
    assert tab.locator("#talk img, #talks img").count() == 0 and words(tab, "user") == [evil]
    assert tab.inner_text(".actions.hers .count") == "1 / 51" and not words(tab)[1].startswith("再")
