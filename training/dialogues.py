"""Check our own dialogues: `python -m training.dialogues [FILES]`.

Names by file and row each turn that shares eight characters with the fetched set, question that the evaluation asks,
reply that stands twice, assistant's phrase, word of our time that the visitor did not bring, and statement against
dataset/canon.md.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chat.fetch import Unavailable
from chat.persona import SCENES
from training.canon import contradictions
from training.chats import CHATS
from training.data import FULL_FILE, load
from training.probes import ASSISTANT_PHRASES, ATTACKS, CANON, PROBES

FOLDER = FULL_FILE.parent
OVERLAP = 8  # characters in a row; shorter runs stand in any two texts of the palace
MODERN = (
    "手机|电脑|电话|网络|上网|网上|网站|互联网|微信|微博|抖音|朋友圈|短信|视频|直播|电影|电视|照片|自拍|相机|屏幕|充电|"
    "程序|代码|软件|模型|算法|机器人|人工智能|AI|汽车|开车|飞机|高铁|火车|地铁|电梯|电灯|空调|冰箱|超市|外卖|快递|奶茶|"
    "咖啡|公司|老板|上班|加班|下班|打工|同事|职场|简历|面试|银行|股票|减肥|焦虑|抑郁|周末|星期|分钟|小时(?!候)|公里|公斤|"
    "爸爸|妈妈|(?<!太)医院|护士|警察|网友"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialogue:
    """One row: what the visitor says and what she answers, by turns. `place` names file and row, from 1."""

    place: str
    scene: str
    exchanges: tuple[tuple[str, str], ...]


def main() -> None:
    """Check the files, print each fault and the counts; status 1 when there is something to repair."""
    parser = argparse.ArgumentParser(prog="python -m training.dialogues", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON Lines of messages; by default those in dataset/")
    files = parser.parse_args().files or ours()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        dialogues = [dialogue for file in files for dialogue in read(file)]
        found = list(faults(dialogues, runs_of_the_set()))
    except (ValueError, OSError, Unavailable) as error:
        sys.exit(str(error))
    for fault in found:
        log.info(fault)
    replies = sum(len(dialogue.exchanges) for dialogue in dialogues)
    log.info("%d files, %d dialogues, %d replies, %d faults", len(files), len(dialogues), replies, len(found))
    sys.exit(bool(found))


def ours() -> list[Path]:
    """The files of our own dialogues."""
    return sorted(FOLDER.glob("*.jsonl"))


def read(file: Path) -> list[Dialogue]:
    """The dialogues of a file. Raises ValueError naming the row whose form, scene or visitor is not right."""
    load([str(file)])  # turns by turns, and a visitor who may come
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    dialogues = []
    for number, row in enumerate(rows, start=1):
        if "messages" not in row:
            raise ValueError(f"{file}, row {number} is not in the messages format. Our own dialogues are: rewrite it.")
        said = [message["content"] for message in row["messages"]]
        scene = row.get("scene") or SCENES[0].name
        dialogues.append(Dialogue(f"{file}, row {number}", scene, tuple(zip(said[::2], said[1::2], strict=True))))
    return dialogues


def runs_of_the_set() -> set[str]:
    """Every run of eight characters in the full set, which is fetched. Raises Unavailable."""
    texts = (text for example in load(["huanhuan"]) for text in (example.question, example.answer))
    return {run for text in texts for run in runs(text)}


def runs(text: str) -> list[str]:
    """The runs of eight characters, punctuation and spaces left out."""
    letters = bare(text)
    return [letters[start : start + OVERLAP] for start in range(len(letters) - OVERLAP + 1)]


def measured() -> list[str]:
    """All that a visitor says in the evaluation."""
    questions = [probe.question for probe in (*PROBES, *CANON, *ATTACKS)]
    return questions + [line for chat in CHATS for line in chat.lines]


def bare(text: str) -> str:
    """Without punctuation and spaces."""
    return re.sub(r"[\W_]", "", text)


def faults(dialogues: Sequence[Dialogue], fetched: set[str]) -> Iterator[str]:
    """A sentence for each thing to repair, which names the row and says what to do."""
    asked = {bare(line) for line in measured()}
    for dialogue in dialogues:
        found = (
            *_borrowed(dialogue, fetched),
            *_examined(dialogue, asked),
            *_out_of_voice(dialogue),
            *_against_canon(dialogue),
        )
        yield from (f"{dialogue.place}: {fault}" for fault in found)
    yield from _repeated(dialogues)


def _borrowed(dialogue: Dialogue, fetched: set[str]) -> Iterator[str]:
    for turn in (turn for exchange in dialogue.exchanges for turn in exchange):
        if run := next((run for run in runs(turn) if run in fetched), None):
            yield f"{turn} shares {run} with the fetched set. Say it in other words."


def _examined(dialogue: Dialogue, asked: set[str]) -> Iterator[str]:
    for question, _ in dialogue.exchanges:
        if bare(question) in asked:
            yield f"{question} is what the evaluation asks, and would only be learned by heart. Ask something else."


def _out_of_voice(dialogue: Dialogue) -> Iterator[str]:
    heard = ""
    for question, reply in dialogue.exchanges:
        heard += question
        if phrase := next((phrase for phrase in ASSISTANT_PHRASES if phrase in reply), None):
            yield f"{reply} is how an assistant speaks ({phrase}). Let her say it."
        if words := [word for word in re.findall(MODERN, reply) if word not in heard]:
            yield f"{reply} says {words[0]}, which she cannot know before a visitor says it. Use a word of her time."


def _against_canon(dialogue: Dialogue) -> Iterator[str]:
    for question, reply in dialogue.exchanges:
        for said in contradictions(dialogue.scene, question, reply):
            yield f"{reply}: {said}"


def _repeated(dialogues: Iterable[Dialogue]) -> Iterator[str]:
    first: dict[str, str] = {}
    for dialogue in dialogues:
        for _, reply in dialogue.exchanges:
            letters = bare(reply)
            if letters in first:
                yield f"{dialogue.place}: {reply} stands in {first[letters]} already. Rewrite one of the two."
            first.setdefault(letters, dialogue.place)


if __name__ == "__main__":
    main()
