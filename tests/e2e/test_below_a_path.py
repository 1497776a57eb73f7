"""The page behind a reverse proxy that serves it below a path, as the nginx of docs/deploy.md does."""

import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

import app
from tests.e2e.steps import say, wait_for_words, wait_until_she_ended, words
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.e2e
PATH = "/zhen"


@pytest.fixture
def below_a_path(monkeypatch):
    """A function that opens the page for an engine behind such a proxy: its address, and what else was asked for."""
    monkeypatch.setenv("GRADIO_ROOT_PATH", PATH)
    opened, strays = [], []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.path.startswith(f"{PATH}/"):
                strays.append(self.path)
                self.send_error(404)
                return
            page = HTTPConnection("127.0.0.1", self.server.page, timeout=30)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            page.request(self.command, self.path.removeprefix(PATH), body, dict(self.headers))
            answer = page.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            while chunk := answer.read1():
                self.wfile.write(chunk)

        do_POST = do_GET  # noqa: N815 - the name is http.server's

        def log_message(self, *_):
            pass

    def start(engine):
        page = app.build_page(engine)
        page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        proxy.daemon_threads = True
        proxy.page = page.server_port
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        opened.extend([proxy.shutdown, proxy.server_close, lambda: page.close(verbose=False)])
        return f"http://127.0.0.1:{proxy.server_port}{PATH}/", strays

    yield start
    for close in opened:
        close()


def test_she_answers_and_manifest_and_icons_are_found(visit, below_a_path):
    url, strays = below_a_path(FakeEngine("臣妾在此处。"))
    tab = visit(url=url)
    say(tab, "可在？")
    wait_for_words(tab, "臣妾在此处。")
    wait_until_she_ended(tab)
    assert words(tab)[-1] == "臣妾在此处。"
    icons = tab.evaluate("""async () => {
      const links = [...document.querySelectorAll("link[rel~=icon], link[rel=manifest]")].map((link) => link.href)
      const manifest = links.find((link) => link.includes("manifest"))
      const { icons, start_url } = await (await fetch(manifest)).json()
      return [...links, ...icons.map(({ src }) => new URL(src, manifest).href), new URL(start_url, manifest).href]
    }""")
    assert len(icons) >= 4 and icons[-1] == url
    assert all(tab.request.get(address).status == 200 for address in icons)
    assert {urlsplit(address).path.startswith(f"{PATH}/") for address in icons} == {True} and not strays
