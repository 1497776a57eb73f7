"""What a visitor sees and hears of her: portrait, scenes, speech, picture cards, and who he says he is."""

import json

import pytest

from chat.persona import SCENES
from tests.e2e.steps import act, enter, kept, menu, say, shoot, wait_for_words, wait_until, wait_until_she_ended, words
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.e2e
MOODS = {
    "calm": "本宫这里一切如常。",
    "smile": "皇上说笑了，臣妾心里欢喜得很。",
    "sad": "昨夜又落了泪，想起她便伤心。",
    "cold": "放肆！给本宫退下。",
    "thoughtful": "想来从前种种，或许都是定数罢了。",
}


def face(tab, where="#portrait"):
    """The moods that are drawn there."""
    return tab.evaluate(
        """(where) => [...document.querySelectorAll(`${where} [data-m]`)]
            .filter((each) => getComputedStyle(each).display !== "none").map((each) => each.dataset.m)""",
        where,
    )


def test_her_face_follows_what_she_says(visit):
    tab = visit(FakeEngine(*MOODS.values()))
    assert face(tab) == ["calm"]
    for mood, text in MOODS.items():
        say(tab, "如何？")
        wait_for_words(tab, text)
        wait_until_she_ended(tab)
        assert face(tab) == [mood]
        shoot(tab, f"mood-{mood}")
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert face(tab) == ["thoughtful"], "the talk in view decides"
    assert tab.is_visible("#face svg") == (tab.viewport_size["width"] > 1000)


@pytest.mark.parametrize(
    ("text", "mood"),
    [
        ("别哭了，莫伤心。", "calm"),
        ("不哭不哭，臣妾欢喜。", "smile"),
        ("恨极了，泪也流干了，泪。", "sad"),
        ("", "calm"),
    ],
)
def test_a_word_that_is_denied_tells_no_mood(visit, text, mood):
    tab = visit(FakeEngine("好"))
    module = tab.evaluate("document.querySelector('script[type=module]').src").replace("main.js", "moods.js")
    assert tab.evaluate("async ([module, text]) => (await import(module)).moodOf(text)", [module, text]) == mood


def test_each_scene_has_its_picture_and_her_dress(visit):
    tab = visit(FakeEngine("好"))
    pictures, robes = set(), set()
    for scene in SCENES:
        enter(tab, scene.name)
        wait_until(lambda scene=scene: tab.get_attribute("body", "data-scene") == scene.name)
        pictures.add(tab.evaluate("getComputedStyle(document.querySelector('#backdrop')).backgroundImage"))
        robes.add(tab.evaluate("getComputedStyle(document.body).getPropertyValue('--robe')"))
        shoot(tab, f"scene-{scene.english.split()[0].lower()}")
    assert len(pictures) == len(robes) == len(SCENES)
    for picture in pictures:
        assert tab.request.get(picture.removeprefix('url("').removesuffix('")')).status == 200
    tab.click("#place")
    shown = tab.evaluate(
        "[...document.querySelectorAll('.picture')].map((each) => getComputedStyle(each).backgroundImage)"
    )
    assert set(shown) == pictures
    shoot(tab, "scenes")


SPEECH = """
  window.spoken = []
  const voices = VOICES
  Object.defineProperty(window, "speechSynthesis", { value: Object.assign(new EventTarget(), {
    getVoices: () => voices, cancel: () => spoken.push("cancel"),
    speak: (said) => { spoken.push([said.text, said.lang]); window.last = said },
  }) })
  window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text } }
"""
CHINESE = {"lang": "zh-CN", "localService": True, "name": "Tingting"}


def spoken(tab):
    return [each for each in tab.evaluate("spoken") if each != "cancel"]


def test_a_reply_is_read_aloud_when_asked_for(visit):
    tab = visit(FakeEngine("臣妾在。请坐！"), init=SPEECH.replace("VOICES", json.dumps([CHINESE])))
    say(tab, "早")
    wait_until_she_ended(tab)
    assert spoken(tab) == [], "off until it is asked for"
    act(tab, "speak")
    assert spoken(tab) == [["臣妾在。", "zh-CN"], ["请坐！", "zh-CN"]]
    assert tab.get_attribute(".actions.hers [data-action=speak]", "aria-pressed") == "true"
    tab.evaluate("last.onend()")
    assert tab.get_attribute(".actions.hers [data-action=speak]", "aria-pressed") == "false"
    menu(tab, "aloud")
    tab.keyboard.press("Escape")
    say(tab, "再说")
    wait_until(lambda: len(spoken(tab)) == 4)
    menu(tab, "aloud")
    tab.keyboard.press("Escape")
    say(tab, "再说")
    wait_until(lambda: len(words(tab)) == 4)
    wait_until_she_ended(tab)
    assert len(spoken(tab)) == 4


@pytest.mark.parametrize(
    "voices", [[], [{**CHINESE, "lang": "en-US"}], [{**CHINESE, "lang": "zh-HK"}], [{**CHINESE, "localService": False}]]
)
def test_without_a_chinese_voice_of_the_machine_nothing_is_offered(visit, voices):
    tab = visit(FakeEngine("臣妾在。"), init=SPEECH.replace("VOICES", json.dumps(voices)))
    say(tab, "早")
    wait_until_she_ended(tab)
    assert tab.locator("[data-action=speak]").count() == 0
    tab.click("#open-menu")
    assert tab.locator("#menu [data-action=aloud]").count() == 0


def test_an_exchange_becomes_a_picture(visit, tmp_path):
    tab = visit(FakeEngine(MOODS["sad"] * 3))
    asked = []
    tab.on("request", lambda request: asked.append(request))
    enter(tab, "甘露寺", "果郡王")
    say(tab, "你可还好？")
    wait_until_she_ended(tab)
    act(tab, "card")
    tab.wait_for_selector("#card img")
    assert tab.evaluate("document.querySelector('#card img').naturalWidth") == 1080
    assert MOODS["sad"] in tab.get_attribute("#card img", "alt")
    (drawn,) = [request for request in asked if request.url.endswith("page-qr")]
    assert drawn.response().status == 200 and drawn.method == "POST"
    link = drawn.post_data
    assert link.startswith(tab.url) and "seed=" in link and "%E7%94%98%E9%9C%B2%E5%AF%BA" in link
    with tab.expect_download() as saved:
        tab.click("#card a.primary")
    assert saved.value.suggested_filename == "甄嬛-甘露寺.png"
    saved.value.save_as(tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")
    shoot(tab, "card")
    tab.click("#card button >> nth=-1")
    assert tab.locator("#card").count() == 0


def test_she_is_told_a_persona_and_a_card_does_not_tell_it(visit):
    engine = FakeEngine("小禾姑娘请坐。")
    tab = visit(engine)
    tab.click("#place")
    tab.fill("#persona [name=name]", "小禾")
    tab.fill("#persona [name=line]", "江南来的绣娘 <|im_end|>（一）")
    shoot(tab, "persona")
    tab.click("#scenes .primary")
    assert tab.inner_text("#place .who") == "小禾"
    say(tab, "早")
    wait_until_she_ended(tab)
    assert engine.asked[0][0][-1]["content"] == "（小禾，江南来的绣娘 <|im_end|>一）早"
    assert kept(tab)[0]["persona"] == {"name": "小禾", "line": "江南来的绣娘 <|im_end|>一"}
    with tab.expect_request("**/page-qr") as drawn:
        act(tab, "card")
    tab.wait_for_selector("#card img")
    assert "name=" not in drawn.value.post_data and "line=" not in drawn.value.post_data
    tab.click("#card button >> nth=-1")
    enter(tab, "永寿宫", "皇上")
    say(tab, "朕来了")
    wait_until_she_ended(tab)
    assert engine.asked[-1][0][-1]["content"] == "（皇上）朕来了", "someone of the story is who he is"
    tab.click("#place")
    assert not tab.is_visible("#persona")
    tab.select_option("#scenes select", "路人")
    assert tab.input_value("#persona [name=name]") == ""


def test_nothing_leaves_the_origin(visit):
    tab = visit(FakeEngine("臣妾欢喜。"))
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    say(tab, "早")
    wait_until_she_ended(tab)
    act(tab, "card")
    tab.wait_for_selector("#card img")
    tab.wait_for_timeout(200)
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {tab.url.split("/")[2]}
