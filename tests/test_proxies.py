"""The environment's proxies: used, refused with a sentence, and left out of a program's own loopback."""

import os
import subprocess
import sys
from urllib.request import getproxies_environment

import pytest

from chat.proxies import check_proxies
from tests.conftest import ROOT

NAMES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "ftp", "no")]
PAGE = """
import app
from tests.fake_engine import FakeEngine
page = app.build_page(FakeEngine("臣妾在。"))
_, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
print(url)
page.close(verbose=False)
"""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in [*NAMES, *map(str.upper, NAMES)]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "address", "advice"),
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "ALL_PROXY (or all_proxy) is a SOCKS proxy"),
        ("https_proxy", "ftp://secret", "HTTPS_PROXY (or https_proxy) is not the address of a proxy"),
        ("HTTP_PROXY", "http://secret:port", "Set it to http://HOST:PORT"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_and_not_quoted(monkeypatch, name, address, advice):
    monkeypatch.setenv(name, address)
    with pytest.raises(ValueError, match="start again") as refused:
        check_proxies()
    assert advice in str(refused.value) and "secret" not in str(refused.value)


def test_loopback_is_left_out_and_what_was_left_out_stays_so(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org, .local")
    check_proxies("10.0.0.7")
    check_proxies("10.0.0.7")
    assert getproxies_environment()["no"] == "example.org, .local,localhost,127.0.0.1,::1,10.0.0.7"


def test_without_proxies_the_environment_stays_as_it_is():
    before = dict(os.environ)
    check_proxies()
    assert dict(os.environ) == before, "macOS and Windows have proxies elsewhere, which no_proxy alone would hide"


@pytest.mark.parametrize("command", [["app.py", "--help"], ["-m", "chat"], ["-m", "training.run"]])
def test_each_program_ends_with_a_sentence(command):
    ended = run(command, ALL_PROXY="socks5://127.0.0.1:9")
    assert ended.returncode == 1 and "ALL_PROXY" in ended.stderr and "Traceback" not in ended.stderr


def test_the_page_opens_beside_a_dead_proxy():
    opened = run(["-c", PAGE], HTTP_PROXY="http://127.0.0.1:9", all_proxy="http://127.0.0.1:9")
    assert opened.stdout.startswith("http://127.0.0.1:"), opened.stderr[-2000:]


def run(command, **proxies):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | proxies, capture_output=True, text=True, timeout=60
    )
