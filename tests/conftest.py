"""The tiny base and the tiny adapter, made once for all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start: many that spin hold each other up

ROOT = Path(__file__).parent.parent
TAUGHT = ROOT / "tests" / "data" / "tiny.jsonl"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """On two shared cores two threads are slower than one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(request, tmp_path, monkeypatch):
    """No test reads or fills the user's cache, except those that need the real base."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setenv("CHAT_CACHE", str(tmp_path / "cache"))
    for name in ("MODEL_FOLDER", "MODEL_SOURCE", "HF_TOKEN", "ADAPTERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _own_modelscope(request, tmp_path, monkeypatch):
    """No test asks the real ModelScope or reads the user's login, except those that need the real base."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setattr("modelscope_hub.config._default_config", None)  # it remembers the settings it saw first
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope-home"))
        monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of the tiny Qwen2."""
    from tests import tiny

    return tiny.make(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(tiny_base):
    from chat.checkpoints import locate

    return locate(str(tiny_base))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_base, tmp_path_factory):
    """The tiny base as a GGUF, with a Base of that name: what llama.cpp opens."""
    from chat.bases import Base, File, Gguf
    from chat.checkpoints import Checkpoint, read_json
    from chat.download import digest
    from tests import tiny

    path = tiny.make_gguf(tiny_base, tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    config = read_json(tiny_base / "config.json")
    gguf = Gguf(tiny_base.name, "local", (File(path.name, path.stat().st_size, digest(path)),))
    return Checkpoint(Base(tiny_base.name, "local", 0, gguf, config), path, "a test")


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    from chat.base_model import load_tokenizer

    return load_tokenizer(checkpoint)


@pytest.fixture
def tiny_run(tiny_base, tmp_path):
    """A function that makes a Run of the tiny recipe in a fresh folder, with some fields changed."""
    from dataclasses import replace

    from training.recipe import TINY, Run

    def make(name="tiny", resume=False, push=None, push_modelscope=None, private=False, pr=False, **fields):
        recipe = replace(TINY, base=str(tiny_base), dataset=(str(TAUGHT),), **fields)
        options = {"resume": resume, "push": push, "push_modelscope": push_modelscope, "private": private, "pr": pr}
        return Run(recipe=recipe, output=tmp_path / name, work=tmp_path / f"{name}-work", **options)

    return make


@pytest.fixture(scope="session")
def trained(tiny_base, tmp_path_factory):
    """The tiny adapter, trained by training.run as a user would train it."""
    from dataclasses import replace

    from training.pipeline import run
    from training.recipe import TINY, Run

    folder = tmp_path_factory.mktemp("trained")
    recipe = replace(TINY, base=str(tiny_base), dataset=(str(TAUGHT),), validation_rows=0, probe_replies=0)
    os.environ["CHAT_CACHE"] = str(folder / "cache")
    return run(Run(recipe=recipe, output=folder / "adapters" / "tiny", work=folder / "work"))


@pytest.fixture
def file_server():
    from tests.servers import FileServer

    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def hub_server(monkeypatch):
    from huggingface_hub import constants

    from tests.servers import HubServer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this one is on loopback
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # and has the older binary storage, LFS
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # else the client asks huggingface.co for a list

    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def modelscope_server(monkeypatch):
    from tests.servers import ModelScopeServer

    server = ModelScopeServer()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
    yield server
    server.close()
