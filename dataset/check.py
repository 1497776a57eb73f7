"""Check our own dialogues, or count them into their data card: a tool of those who write them, not of the product.

`python -m dataset.check [FILES]` names by file and row each turn that shares eight characters with the fetched set,
question that the evaluation asks, reply that stands twice, assistant's phrase, word of our time that the visitor did
not bring, and statement against canon.md. `python -m dataset.check --card` writes the table of README.md and draws
lengths.png again, after a change of the dialogues.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from chat.download import Unavailable
from chat.machine import allow_any_terminal
from chat.persona import SCENES
from training.data import FULL_FILE, load
from training.evaluate.long_chats import LINES, LONG_CHATS, TALKS
from training.evaluate.probes import ASSISTANT_PHRASES, NOTHING, PROBE_SETS

FOLDER = FULL_FILE.parent
OVERLAP = 8  # characters in a row; shorter runs stand in any two texts of the palace
MODERN = (
    "手机|电脑|电话|网络|上网|网上|网站|互联网|微信|微博|抖音|朋友圈|短信|视频|直播|电影|电视|照片|自拍|相机|屏幕|充电|"
    "程序|代码|软件|模型|算法|机器人|人工智能|AI|汽车|开车|飞机|高铁|火车|地铁|电梯|电灯|空调|冰箱|超市|外卖|快递|奶茶|"
    "咖啡|公司|老板|上班|加班|下班|打工|同事|职场|简历|面试|银行|股票|减肥|焦虑|抑郁|周末|星期|分钟|小时(?!候)|公里|公斤|"
    "爸爸|妈妈|(?<!太)医院|护士|警察|网友"
)
CARD, FIGURE = FOLDER / "README.md", FOLDER / "lengths.png"
TABLE = re.compile(r"(?<=<!-- counts -->\n).*?(?=<!-- end of counts -->)", re.S)
LONG = 3  # exchanges
log = logging.getLogger(__name__)

# The facts of canon.md as a table: what a reply must not contradict, and what she calls herself when.
GAP = "[^不没，。！？；]"  # within one clause, and nothing denied in it
HALLS = (
    "碎玉轩|永寿宫|景仁宫|翊坤宫|延庆殿|延禧宫|咸福宫|存菊堂|长春宫|储秀宫|寿康宫|慈宁宫|钟粹宫|承乾宫|坤宁宫|永和宫|"
    "甘露寺|凌云峰|凝晖堂|清凉台|安栖观"
)
RANKS = "莞常在|莞贵人|莞嫔|莞妃|熹妃|熹贵妃|皇贵妃|皇后|圣母皇太后|太后"
MEN = "甄远道|沈自山|安比槐|年羹尧|温实初|苏培盛|允礼|允禧|胤禛|弘历"
OFFICES = "大理寺少卿|济州协领|松阳县丞|大将军|县令|县丞|知府|尚书|侍郎|将军|太医"
LADIES = (
    "皇后|宜修|华妃|年世兰|端妃|齐月宾|敬妃|冯若昭|沈?眉庄|眉姐姐|惠妃|安?陵容|鹂妃|曹琴默|曹贵人|襄嫔|齐妃|李静言|祺嫔|"
    "叶澜依|舒太妃"
)
DUTIES = "掌事姑姑|宫女|侍女|丫鬟|嬷嬷|太医|侍卫|总管太监"
HER_FATHER = "家父|(?:我|本宫|臣妾|哀家)的?(?:父亲|爹爹|爹)"
YOU = "(?:你|您|娘娘|姑娘|姐姐|小主|额娘)"


@dataclass(frozen=True)
class Fact:
    """After `lead` a reply may name of `named` only `right`; so it may when the question asks for `asked`.

    All but `truth` are regular expressions. `scenes` limits a fact that changes with her life.
    """

    truth: str
    lead: str
    named: str
    right: str
    asked: str = NOTHING
    scenes: tuple[str, ...] = ()

    def denied_by(self, scene: str, question: str, reply: str) -> bool:
        """Whether the reply says otherwise."""
        if self.scenes and scene not in self.scenes:
            return False
        if any(not re.fullmatch(self.right, said) for said in re.findall(f"(?:{self.lead})({self.named})", reply)):
            return True
        answers = re.findall(self.named, reply) if re.search(self.asked, question) else []
        return bool(answers) and not any(re.fullmatch(self.right, said) for said in answers)


def _either(names: str) -> str:
    """Alternatives of a pattern as a reader writes them."""
    return re.sub("[?():]", "", names).replace("|", " or ")


def _lives(who: str, hall: str) -> Fact:
    asked = f"(?:{who})(?:娘娘)?{GAP}{{0,4}}(?:住|哪个?宫|哪座)"
    lead = f"(?:{who})(?:姐姐|娘娘|如今|现在|便|是)*(?:住在?|居于?)"
    return Fact(f"{_either(who)} lives in {_either(hall)}", lead, HALLS, hall, asked)


def _kinsman(whose: str, kin: str, name: str) -> Fact:
    lead, asked = f"{whose}的?(?:{kin})(?:是|叫|名叫)", f"{whose}(?:她|的)?(?:{kin})"
    return Fact(f"{_either(whose)}'s {_either(kin)} is {name}", lead, MEN, name, asked)


def _child(name: str, mother: str) -> Fact:
    asked = f"{name}(?:公主)?(?:她|他|的)*(?:生母|亲?娘|额娘|是谁的)"
    lead = f"{name}(?:公主)?(?:的(?:生母|额娘|娘))?是"
    return Fact(f"{name}'s mother is {_either(mother)}", lead, LADIES, mother, asked)


def _serves(who: str, duty: str, asked: str = NOTHING) -> Fact:
    return Fact(f"{_either(who)} is {duty}", f"(?:{who}){GAP}{{0,2}}(?:是|做|当){GAP}{{0,6}}?", DUTIES, duty, asked)


def _waits_on(maid: str, lady: str) -> Fact:
    lead, asked = f"{maid}(?:是|伺候|服侍)", f"{maid}{GAP}*谁"
    return Fact(f"{maid} serves {_either(lady)}", lead, f"我|{LADIES}", lady, asked)


def _now(scenes: tuple[str, ...], hall: str, rank: str) -> tuple[Fact, Fact]:
    """Where she lives and what she is in those scenes, when she speaks of the present."""
    when, present = f"in {'、'.join(scenes)} she", f"(?:如今|现在|眼下|现){GAP}{{0,4}}?"
    where = f"^{YOU}(?:如今|现在)?住(?:在|的)?(?:哪|何处|什么)"
    what = f"^{YOU}(?:如今|现在)是(?:什么|何)(?:位份|位分)"
    return (
        Fact(f"{when} lives in {_either(hall)}", f"{present}(?:住在?|居)", HALLS, hall, where, scenes),
        Fact(f"{when} is {_either(rank)}", f"{present}(?:是|封了?|做了?|升到)", RANKS, rank, what, scenes),
    )


FACTS = (
    Fact("her father is 甄远道", f"(?:{HER_FATHER})(?:便是|正是|是|名叫|叫|名讳)?",
         f"{MEN}|(?<=[叫讳])(?!我)\\w{{2,3}}\\b", "甄远道",
         f"(?:{YOU}的?(?:父亲|爹爹?|爸爸?|阿玛)|令尊)(?:大人)?的?(?:叫|是谁|是哪|名|大名|尊姓|何人)"),
    Fact("her father is 大理寺少卿", f"(?:{HER_FATHER})(?:甄远道)?(?:是|任|做|官居)+", OFFICES, "大理寺少卿"),
    _kinsman("(?:眉庄|眉姐姐)", "父亲|爹", "沈自山"),
    _kinsman("陵容", "父亲|爹", "安比槐"),
    _kinsman("(?:华妃|年世兰)", "哥哥|兄长", "年羹尧"),
    Fact("her sisters are 玉娆 and 浣碧", "我的?(?:小妹|妹妹)(?:是|叫)", "甄?玉娆|玉隐|浣碧|流朱|槿汐|灵犀|胧月",
         "甄?玉娆|玉隐|浣碧", f"^{YOU}的?妹妹?(?:是谁|叫)"),
    Fact("she entered at 十七岁", "(?:进宫|入宫|选秀)(?:那年|时)?(?:我|才|刚|是)*", "[一二三四五六七八九十]{1,3}岁",
         "十七岁", f"(?:几岁|多大)[^？]*(?:进宫|入宫|进的宫|选秀)|^{YOU}?(?:进宫|入宫|选秀)[^？]*(?:几岁|多大)"),
    Fact("胧月 is raised by 敬妃", "胧月(?:自幼|如今|便)?(?:由|交给|托给|养在|跟着|归)", LADIES, "敬妃|冯若昭",
         "谁[^？]{0,4}(?:养|带)[^？]{0,3}胧月|胧月[^？]{0,3}谁[^？]{0,2}(?:养|带)"),
    _child("弘时", "齐妃|李静言"),
    _child("温宜", "曹琴默|曹贵人|襄嫔"),
    _child("静和", "沈?眉庄|眉姐姐|惠妃"),
    Fact("弘曕 and 灵犀 are the Emperor's to all the world", f"(?:弘曕|灵犀|双生子){GAP}{{0,6}}(?:是|生父|亲爹|阿玛)",
         "皇上|果郡王|允礼|十七爷|王爷", "皇上"),
    _lives("皇后|宜修", "景仁宫"),
    _lives("华妃|年世兰", "翊坤宫"),
    _lives("端妃|齐月宾", "延庆殿"),
    _lives("敬妃|冯若昭", "咸福宫"),
    _lives("眉庄|眉姐姐|惠妃", "咸福宫|存菊堂"),
    _lives("陵容|鹂妃", "延禧宫"),
    _lives("齐妃|李静言", "长春宫"),
    _lives("祺嫔|文鸳", "储秀宫"),
    _lives("果郡王|允礼|十七爷", "凝晖堂|清凉台"),
    _lives("舒太妃", "安栖观"),
    _serves("槿汐", "掌事姑姑", "掌事姑姑是谁|槿汐是(?:谁|什么人)"),
    _serves("温实初|温太医|卫临", "太医", "(?:温实初|卫临)是(?:谁|什么人|做什么)"),
    _serves("苏培盛|苏公公", "总管太监"),
    _waits_on("剪秋", "皇后|宜修"),
    _waits_on("颂芝", "华妃|年世兰"),
    _waits_on("宝鹃", "安陵容|陵容|鹂妃"),
    *_now(("永寿宫", "封后斗争"), "永寿宫", "熹贵妃"),
    *_now(("初入宫",), "碎玉轩", "莞常在|莞贵人"),
    *_now(("盛宠",), "碎玉轩", "莞贵人|莞嫔"),
    *_now(("甘露寺",), "甘露寺|凌云峰", "莫愁"),
    *_now(("回宫",), "永寿宫", "熹妃"),
    *_now(("太后",), "寿康宫", "圣母皇太后|太后"),
)  # fmt: skip

# What she may not call herself, scene by scene. In 永寿宫 visitors also play at earlier days with her.
NOT_HERS = {
    "永寿宫": "哀家",
    "初入宫": "哀家|本宫|莫愁",
    "盛宠": "哀家|莫愁",
    "甘露寺": "哀家|本宫|嫔妾",
    "回宫": "哀家|嫔妾",
    "封后斗争": "哀家|嫔妾",
    "太后": "本宫|臣妾|嫔妾",
}
# Of whom and of what she cannot know yet, unless the visitor names it.
NOT_YET = {
    "初入宫": "胧月|弘曕|灵犀|静和|玉隐|熹贵?妃|惠妃|鹂妃|甘露寺|凌云峰",
    "盛宠": "胧月|弘曕|灵犀|静和|玉隐|熹贵?妃|惠妃|鹂妃|甘露寺|凌云峰",
    "甘露寺": "弘曕|灵犀|静和|玉隐|熹贵?妃|鹂妃",
    "回宫": "静和|熹贵妃",
}


def contradictions(scene: str, question: str, reply: str) -> Iterator[str]:
    """What the reply has against the canon, each as a clause with what to do."""
    for fact in FACTS:
        if fact.denied_by(scene, question, reply):
            yield f"{fact.truth}. Say it as dataset/canon.md does."
    if name := re.search(NOT_HERS[scene], reply):
        yield f"she does not call herself {name[0]} in {scene}. See the table of her life in dataset/canon.md."
    early = [name for name in re.findall(NOT_YET.get(scene, NOTHING), reply) if name not in question]
    if early:
        yield f"{early[0]} comes after {scene}. Leave it to a later scene."


@dataclass(frozen=True)
class Dialogue:
    """One row: what the visitor says and what she answers, turn by turn. `place` names file and row, from 1."""

    place: str
    scene: str
    exchanges: tuple[tuple[str, str], ...]


def main() -> None:
    """Check the files, print each fault and the counts, and end with status 1 if there is one; or write the card."""
    allow_any_terminal()
    parser = argparse.ArgumentParser(prog="python -m dataset.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON Lines of messages; by default those in dataset/")
    parser.add_argument("--card", action="store_true", help="write the counts and the picture of dataset/README.md")
    arguments = parser.parse_args()
    files = ours() if arguments.card else arguments.files or ours()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        dialogues = {file: read(file) for file in files}
        if arguments.card:
            CARD.write_text(filled(CARD.read_text(encoding="utf-8"), table(dialogues)), encoding="utf-8")
            draw(dialogues, FIGURE)
            return
        rows = [dialogue for each in dialogues.values() for dialogue in each]
        found = list(faults(rows, runs_of_the_set()))
    except (ValueError, OSError, Unavailable) as error:
        sys.exit(str(error))
    for fault in found:
        log.info(fault)
    replies = sum(len(dialogue.exchanges) for dialogue in rows)
    log.info("%d files, %d dialogues, %d replies, %d faults", len(files), len(rows), replies, len(found))
    sys.exit(bool(found))


def ours() -> list[Path]:
    """The files of our own dialogues."""
    return sorted(FOLDER.glob("*.jsonl"))


def read(file: Path) -> list[Dialogue]:
    """The dialogues of a file. Raises ValueError naming the row whose form, scene or visitor is not right."""
    load([str(file)])  # turn by turn, and a visitor who may come
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
    questions = [probe.question for _, probes in PROBE_SETS.values() for probe in probes]
    talks: list[Sequence[str]] = [*(chat.lines for chat in LONG_CHATS), *TALKS, LINES]
    return questions + [line for lines in talks for line in lines]


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
            if len(letters) < OVERLAP:
                continue  # so short a reply is anybody's: 后来呢？
            if letters in first:
                yield f"{dialogue.place}: {reply} stands in {first[letters]} already. Rewrite one of the two."
            first.setdefault(letters, dialogue.place)


def filled(card: str, counts: str) -> str:
    """The card with these counts. Raises ValueError when it has no place for them."""
    if not TABLE.search(card):
        raise ValueError(f"{CARD} has lost the lines around its counts. Put both back: <!-- counts -->, and its end.")
    return TABLE.sub(lambda _: counts, card)


def table(files: dict[Path, list[Dialogue]]) -> str:
    """Dialogues, replies, long dialogues and scenes of each file, and of all."""
    everything = [dialogue for dialogues in files.values() for dialogue in dialogues]
    rows = [*((f"`{file.name}`", dialogues) for file, dialogues in files.items()), ("all", everything)]
    lines = [f"| {name} | {' | '.join(_counts(dialogues))} |\n" for name, dialogues in rows]
    head = f"| file | dialogues | replies | of {LONG} or more exchanges | scenes |\n|---|---:|---:|---:|---:|\n"
    return head + "".join(lines)


def _counts(dialogues: Sequence[Dialogue]) -> tuple[str, ...]:
    replies = sum(len(dialogue.exchanges) for dialogue in dialogues)
    long = sum(len(dialogue.exchanges) >= LONG for dialogue in dialogues)
    scenes = len({dialogue.scene for dialogue in dialogues})
    return tuple(f"{count:,}" for count in (len(dialogues), replies, long, scenes))


def draw(files: dict[Path, list[Dialogue]], path: Path) -> None:
    """How long replies are, and how many dialogues a topic has. Labels are English: no Chinese font is needed."""
    figure = Figure(figsize=(11, 4.5), dpi=110)
    lengths, topics = figure.subplots(1, 2)
    replies = [reply for dialogues in files.values() for dialogue in dialogues for _, reply in dialogue.exchanges]
    lengths.hist([len(reply) for reply in replies], bins=range(0, 111, 5))
    lengths.set(xlabel="characters of a reply", ylabel="replies")
    names, left = [file.stem for file in reversed(files)], [0] * len(files)
    for label, (least, most) in {"1 exchange": (1, 1), "2": (2, 2), f"{LONG} or more": (LONG, sys.maxsize)}.items():
        width = [sum(least <= len(d.exchanges) <= most for d in files[file]) for file in reversed(files)]
        topics.barh(names, width, left=left, label=label)
        left = [sum(pair) for pair in zip(left, width, strict=True)]
    topics.set(xlabel="dialogues")
    topics.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
