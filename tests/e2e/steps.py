"""What a visitor does and sees."""

import time

from tests.conftest import ROOT

SHOTS = ROOT / "runs" / "screenshots"
BOX = "#composer textarea"
LONG = "昨夜落了一场雨，院里的海棠谢了大半，我叫槿汐扫了些花瓣收着，预备酿酒。" * 6


def say(tab, text):
    tab.fill(BOX, text)
    tab.press(BOX, "Enter")


def shoot(tab, name):
    """Leave a picture for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"{name}-{tab.viewport_size['width']}.png")


def words(tab, who="bot"):
    """What stands in the bubbles of the talk in view; her greeting is the first."""
    return [bubble.inner_text().strip() for bubble in tab.query_selector_all(f"[data-testid={who}] .words")]


def wait_for_words(tab, text):
    tab.locator("[data-testid=bot]").filter(has_text=text).last.wait_for()


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_she_ended(tab):
    tab.wait_for_selector("body:not([data-busy])")


def enter(tab, scene, visitor=None):
    """Choose a scene, and who comes to her, in the sheet."""
    tab.click("#place")
    tab.locator(f"#scenes .scene[data-scene='{scene}']").click()
    if visitor:
        tab.select_option("#scenes select", visitor)
    tab.click("#scenes .primary")


def act(tab, key, at=-1, of="hers"):
    """Press a sign below a bubble, or an entry of the list that opens behind More."""
    row = tab.locator(f".actions.{of}").nth(at)
    if row.locator(f"[data-action={key}]").count() == 0:
        row.locator("[data-action=more]").click()
    row.locator(f"[data-action={key}]").click()


def menu(tab, key):
    tab.click("#open-menu")
    tab.click(f"#menu [data-action={key}]")


def titles(tab):
    """The titles in the list of talks, which stays open."""
    if not tab.is_visible("#talks"):
        tab.click("#open-talks")
    return [entry.inner_text().strip() for entry in tab.query_selector_all("#talks .entry .title")]


def open_talk(tab, title):
    titles(tab)
    tab.locator("#talks .entry").get_by_text(title, exact=True).click()


def kept(tab):
    """The talks as IndexedDB holds them."""
    return tab.evaluate("""() => new Promise((done) => {
      const request = indexedDB.open('zhenhuan', 1)
      request.onsuccess = () => {
        const all = request.result.transaction('talks').objectStore('talks').getAll()
        all.onsuccess = () => { request.result.close(); done(all.result) }
      }
    })""")
