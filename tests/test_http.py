"""What a browser is sent: small, once, under the policy, and a reply as it comes."""

import gzip
import re
import urllib.error
import urllib.request

import brotli
import pytest
from gradio_client import Client

import app
from chat import persona
from page.http import HEADERS
from tests.fake_engine import FakeEngine

ENGINE = FakeEngine("昨夜落了一场雨。" * 20, pause=0.02)
DECODERS = {"br": brotli.decompress, "gzip": gzip.decompress}


@pytest.fixture(scope="module")
def address():
    page = app.build_page(ENGINE)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    yield url.rstrip("/")
    page.close()


def get(url, **headers):
    """Status, headers and body."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture(scope="module")
def asset(address):
    """The script that the document asks for."""
    return address + re.search(rb'src="\.(/assets/index-[^"]+\.js)"', get(address)[2])[1].decode()


@pytest.mark.parametrize("path", ["/", "/no/such/page", "/gradio_api/info", "/favicon.ico", "/theme.css"])
def test_every_answer_carries_the_policy_that_keeps_it_to_its_origin(address, path):
    for _ in range(2):
        _, headers, _ = get(address + path, Accept_Encoding="br")
        assert {name: headers[name] for name in HEADERS} == HEADERS
        _, headers, _ = get(address + path, Accept_Encoding="br", If_None_Match=headers["ETag"] or "*")
        assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "img-src 'self' data: blob:" in HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize("coding", DECODERS)
def test_document_and_files_are_compressed(address, asset, coding):
    for url, share in ((address, 5), (asset, 2.5), (f"{address}/theme.css", 4)):
        _, plain, whole = get(url)
        _, headers, body = get(url, Accept_Encoding=f"deflate, {coding}")
        assert headers["Content-Encoding"] == coding and not plain["Content-Encoding"]
        assert DECODERS[coding](body) == whole and len(body) * share < len(whole)
        assert headers["Vary"] == plain["Vary"] == "Accept-Encoding"
        assert headers["ETag"] != plain["ETag"]


@pytest.mark.parametrize("coding", ["br", "gzip", "identity"])
@pytest.mark.parametrize("path", ["/", "/static/js/iframeResizer.contentWindow.min.js", "/favicon.ico"])
def test_what_has_not_changed_is_asked_for_again_and_not_sent_again(address, path, coding):
    _, headers, body = get(address + path, Accept_Encoding=coding)
    assert headers["Cache-Control"] == "no-cache" and body
    status, again, body = get(address + path, Accept_Encoding=coding, If_None_Match=headers["ETag"])
    assert (status, body, again["ETag"]) == (304, b"", headers["ETag"])
    assert get(address + path, Accept_Encoding=coding, If_None_Match='"another"')[0] == 200


def test_what_is_named_after_its_content_is_not_asked_for_again(address, asset):
    named = re.search(rb'"theme_hash":"(\w+)"', get(address)[2])[1].decode()
    for url in (asset, f"{address}/theme.css?v={named}"):
        assert get(url)[1]["Cache-Control"] == "public, max-age=31536000, immutable"
    for path in ("/theme.css", "/assets/index-00000000.js", "/health"):
        assert "immutable" not in (get(address + path)[1]["Cache-Control"] or "")


def test_what_the_page_draws_itself_is_asked_for_once_under_an_address_of_its_content(address):
    path = re.search(rb'src="(page-static/[0-9a-f]{16}/)main.js"', get(address)[2])[1].decode()
    for name, kind in (("main.js", "text/javascript"), ("texts.js", "text/javascript"), ("favicon.svg", "image/svg")):
        status, headers, _ = get(f"{address}/{path}{name}", Accept_Encoding="br")
        assert status == 200 and headers["Content-Type"].startswith(kind) and headers["Content-Encoding"] == "br"
        assert headers["Cache-Control"] == "public, max-age=31536000, immutable"
    for gone in (f"{path}..%2fpage.css", f"{path}nothing.js", "page-static/0123456789abcdef/main.js"):
        status, headers, _ = get(f"{address}/{gone}")
        assert status == 404 and "immutable" not in (headers["Cache-Control"] or "")


def test_no_font_is_fetched(address):
    assert b"@font-face" not in get(f"{address}/theme.css")[2]


def test_a_reply_streams(address):
    job = Client(address, verbose=False).submit("讲讲昨夜", api_name="/chat")
    first, _ = next(iter(job))
    assert ENGINE.running and len(first) < 80, "held back until it was whole"
    job.cancel()


def test_a_stream_of_events_passes_untouched(address):
    url = f"{address}/gradio_api/heartbeat/somebody"  # one without an end
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Accept-Encoding": "br, gzip"}), timeout=10
    ) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert not answer.headers["Content-Encoding"] and not answer.headers["Content-Length"]
        assert answer.read(5) == b"data:"


def assert_greets_at_once(document):
    before, _, _ = document.decode().partition("<gradio-app")
    assert persona.GREETING in before and 'id="bar"' in before and "#talk {" in before


def test_the_document_has_her_greeting(address):
    assert_greets_at_once(get(address)[2])


def test_a_shared_page_fetches_nothing_from_elsewhere(monkeypatch):
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **there: f"http://127.0.0.1:{there['local_port']}")
    page = app.build_page(FakeEngine("好"))
    _, url, shared = page.launch(prevent_thread_lock=True, quiet=True, share=True, **app.LAUNCH)
    try:
        assert shared
        _, _, document = get(url)
        assert_greets_at_once(document)
        assert not re.search(rb'<(script|link)[^>]+(src|href)="http', document), "the policy refuses it"
    finally:
        page.close(verbose=False)


def test_the_page_can_lie_below_a_path(monkeypatch):
    page = app.build_page(FakeEngine("好"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, root_path="/zhen", **app.LAUNCH)
    try:
        for path in ("", "zhen/"):  # as proxies hand it on, without the path or with it
            status, headers, document = get(url + path)
            assert status == 200 and b'/zhen"' in document and headers["ETag"]
            script = re.search(rb'src="\./(assets/[^"]+)"', document)[1].decode()
            assert "immutable" in get(url + path + script)[1]["Cache-Control"]
    finally:
        page.close(verbose=False)
