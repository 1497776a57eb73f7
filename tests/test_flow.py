"""What the engine says reaches the visitor at once, in few events."""

import time

import pytest

from page.gradio_internals import gr
from page.service import MAX_INTERVAL, ChatRequest, ChatService, event_interval
from tests.fake_engine import FakeEngine

ASK = [{"role": "user", "content": "早"}]


def events(engine):
    """(seconds, text) of each event of a reply."""
    began = time.monotonic()
    replies = ChatService(engine).generate(ASK, ChatRequest(adapter="scripted"), "visitor")
    return [(time.monotonic() - began, reply.text) for (reply,) in replies]


def test_letters_that_come_fast_leave_together_and_none_is_lost():
    text = "臣妾明白。" * 60
    seen = events(FakeEngine(text, pause=0.001))
    assert seen[-1][1] == text and 3 < len(seen) < 40
    assert seen[0][1] == "臣"  # the first letter does not wait for others


def test_letters_that_come_slowly_leave_one_by_one():
    assert [text for _, text in events(FakeEngine("一二三四", pause=0.12))][:4] == ["一", "一二", "一二三", "一二三四"]


@pytest.mark.parametrize("generating", [1, 8, 32, 128, 10_000])
def test_first_words_come_sooner_and_no_event_is_late(generating):
    intervals = [event_interval(generating, events) for events in range(1, 9)]
    assert intervals == sorted(intervals) and intervals[0] <= MAX_INTERVAL / 4 and intervals[-1] <= MAX_INTERVAL


def test_a_new_session_gets_its_own_copy_of_what_each_component_is():
    with gr.Blocks() as page:
        box = gr.Textbox("早", label="box")
    one, two = (page.default_config.config_for_block(box._id, [], box) for _ in range(2))
    one["props"]["value"] = "changed by one visitor"
    assert two["props"]["value"] == "早" and one["type"] == two["type"] == "textbox"
