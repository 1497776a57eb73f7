"""A browser, and the page opened in it for an engine."""

import os

import pytest

import app

WINDOWS = {
    1280: {"viewport": {"width": 1280, "height": 900}},
    390: {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=WINDOWS)
def visit(browser, request):
    """A function that opens the page for an engine, on a desktop and on a phone, and returns the tab.

    With `url` it opens a page that is served already; with `beside` a second tab of the same visitor.
    """
    opened, faults = [], []

    def start(engine=None, path="", url=None, beside=None, init="", **window):
        if beside:
            tab, url = beside.context.new_page(), beside.url
        else:
            if url is None:
                page = app.build_page(engine)
                _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
                opened.append(page)
            window = {"locale": "zh-CN", "timezone_id": "Asia/Shanghai"} | WINDOWS[request.param] | window
            context = browser.new_context(**window)
            context.add_init_script(init)
            opened.insert(0, context)
            tab = context.new_page()
        tab.set_default_timeout(15_000)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.goto(url + path)
        tab.wait_for_selector("body[data-ready]")
        return tab

    yield start
    for thing in opened:
        thing.close()
    assert not faults, "a script of the page failed"
