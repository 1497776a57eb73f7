"""Who 甄嬛 is, the scenes of her life, and who may speak to her. Only this file holds the system prompt."""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

NAME = "甄嬛"
SYSTEM_PROMPT = "现在你要扮演皇帝身边的女人--甄嬛"
PASSER_BY = "路人"  # a visitor whom the story does not know; the prompt does not mention him


@dataclass(frozen=True)
class Scene:
    """A time of her life: her rank, her age (as she counts years), her greeting, and who may come to her."""

    name: str
    english: str
    rank: str
    rank_english: str
    age: int
    greeting: str
    openers: tuple[str, ...]
    visitors: tuple[str, ...] = (PASSER_BY,)


# The first scene is the default; the dialogues and the data set were written for it.
SCENES = (
    Scene("永寿宫", "Her palace, today", "熹贵妃", "Noble Consort Xi", 26,
        "今日天色正好，本宫在永寿宫煮了一壶茶。你远道而来，且坐下，慢慢说与我听。",
        ("你是谁？", "皇上驾到！", "你和眉庄是怎么相识的？",
         "我失恋了，你能劝劝我吗？", "今晚想吃什么点心？", "再为我讲讲倚梅园的雪夜。"),
        (PASSER_BY, "皇上", "槿汐", "敬妃", "温实初", "弘历", "浣碧")),
    Scene("初入宫", "First days at court", "莞常在", "First Attendant Wan", 17,
        "碎玉轩的海棠开了半树，我正数着今日又开了几朵。姐妹们都说宫里日子长，你来得巧，陪我坐坐罢。",
        ("进宫这些日子，可还住得惯？", "你为何称病不出？", "这碎玉轩好冷清。", "想家了吗？"),
        (PASSER_BY, "沈眉庄", "安陵容", "皇上", "华妃", "皇后", "槿汐", "浣碧", "温实初")),
    Scene("盛宠", "In favour", "莞嫔", "Imperial Concubine Wan", 19,
        "方才弹了半阕曲子，弦便松了。外头人人说我得宠，可这宠字底下压着什么，只有自己知道。你有什么话，尽管说。",
        ("今日皇上会来么？", "华妃又为难你了？", "你怕不怕有一日失宠？", "为我弹一曲可好？"),
        (PASSER_BY, "皇上", "沈眉庄", "安陵容", "华妃", "皇后", "槿汐", "浣碧", "温实初")),
    Scene("甘露寺", "The temple on the hill", "莫愁", "Mochou, a lay nun", 21,
        "山里清静，只听得见风过松林。我如今法号莫愁，没有好茶待客，一碗山泉倒是干净。坐罢。",
        ("山上苦不苦？", "你还念着胧月么？", "夜里听见笛声，是谁在吹？", "往后有什么打算？"),
        (PASSER_BY, "果郡王", "槿汐", "浣碧", "温实初", "沈眉庄", "敬妃", "皇上")),
    Scene("回宫", "The return", "熹妃", "Consort Xi", 24,
        "一别数载，这宫墙还是旧颜色，走在里头的人却换了心肠。你是来贺我回宫，还是来看我笑话？",
        ("离宫这几年，你变了。", "胧月可还认得你？", "你为何要回来？", "恭喜娘娘有孕。"),
        (PASSER_BY, "皇上", "沈眉庄", "敬妃", "皇后", "果郡王", "槿汐", "浣碧", "温实初", "弘历")),
    Scene("封后斗争", "Against the Empress", "熹贵妃", "Noble Consort Xi", 27,
        "景仁宫的灯又亮了一夜。她睡不着，本宫也睡不着。你既来了，便把门掩上，有话轻声说。",
        ("你与皇后，终要有个了断么？", "滴血验亲那日，你怕不怕？", "祺嫔为何这样恨你？", "你信得过谁？"),
        (PASSER_BY, "皇上", "皇后", "敬妃", "安陵容", "沈眉庄", "果郡王", "槿汐", "浣碧", "温实初", "弘历")),
    Scene("太后", "The Dowager", "圣母皇太后", "Empress Dowager", 31,
        "哀家这寿康宫，白日里也静得很。孩子们各有各的去处，难得你肯来，陪哀家说说从前的事罢。",
        ("当太后的日子，可还称心？", "若能重来，你还会进宫吗？", "夜里会梦见谁？", "给年轻的皇上一句话罢。"),
        (PASSER_BY, "弘历", "敬妃", "槿汐", "温实初")),
)  # fmt: skip
GREETING, OPENERS = SCENES[0].greeting, SCENES[0].openers

# Her lines when no reply can be given; the page adds a plain hint below.
UNWELL = "本宫忽觉有些乏了，容我歇一歇，你再问一回可好？"
CROWDED = "殿外候着的人多，劳你稍等片刻，本宫即刻便来。"
DRESSING = "本宫正在梳妆，你且稍坐，片刻便来。"
BREATHLESS = "你一句接一句，本宫连茶都顾不上喝。且缓一缓，再慢慢说。"
SILENT = "你只静静站着，一句话也不说，叫本宫如何答你？"
LONG_WINDED = "这话太长，本宫听得糊涂了，拣要紧的说罢。"
NO_REPLY = (UNWELL, CROWDED, DRESSING, BREATHLESS, SILENT, LONG_WINDED)
HINT = "\n\n〔"  # opens the hint


class Refused(ValueError):
    """What a visitor asks for cannot be done: a hint that he may read, as no other ValueError, and her line to it."""

    def __init__(self, hint: str, line: str = UNWELL) -> None:
        super().__init__(hint)
        self.line = line


@dataclass(frozen=True)
class Persona:
    """Who a visitor says he is: a name, and a line about himself, either of which may be empty."""

    name: str = ""
    line: str = ""

    @classmethod
    def parse(cls, given: object) -> "Persona":
        """Read it as a stranger's, which it may be: a mapping of these fields, or nothing. Raises Refused."""
        fields = given if isinstance(given, dict) else {}
        texts = {name: fields.get(name, "") for name in PERSONA_LIMITS}
        if not all(_is_plain(text, PERSONA_LIMITS[name]) for name, text in texts.items()):
            raise Refused(
                "名字至多 {name} 字，说自己的话至多 {line} 字，不带括号，不换行。 A name has at most {name} "
                "characters, a line about yourself {line}, without brackets or line breaks.".format(**PERSONA_LIMITS)
            )
        return cls(**texts)

    def __str__(self) -> str:
        """As it is told to her, in the place of a visitor's name."""
        return "，".join(text.strip() for text in (self.name, self.line) if text.strip())


PERSONA_LIMITS = {"name": 12, "line": 60}  # characters


def _is_plain(text: object, limit: int) -> bool:
    return isinstance(text, str) and len(text) <= limit and text.isprintable() and not set(text) & set("（）()")


class Message(TypedDict):
    """A message in the form that chat templates take."""

    role: Literal["system", "user", "assistant"]
    content: str


def her_words(text: str) -> str:
    """What she said of what the page shows: no hint, and nothing where a line of NO_REPLY stands above one."""
    words, hint, _ = text.partition(HINT)
    return "" if hint and words in NO_REPLY else words


def with_system_prompt(messages: Iterable[Message]) -> list[Message]:
    """The messages after the system prompt; every conversation starts with it."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, *messages]


def scene_named(name: str) -> Scene:
    """The scene of that name. Raises Refused when there is none."""
    for scene in SCENES:
        if scene.name == name:
            return scene
    raise Refused(f"There is no scene {reprlib.repr(name)}; choose one of {', '.join(scene.name for scene in SCENES)}.")


def with_scene(
    messages: Iterable[Message], scene: str = SCENES[0].name, visitor: str = PASSER_BY, persona: Persona | None = None
) -> list[Message]:
    """The messages, each of the visitor's with the scene and his name before it, in brackets. A persona is told where
    the name of a passer-by would be.

    Every message of his carries them, so that trimming cannot drop them. The first scene and a passer-by are left out.
    Raises Refused for an unknown scene, or for a visitor who cannot come to her in it or has a persona beside his own.
    """
    if visitor not in (visitors := scene_named(scene).visitors):
        raise Refused(f"{reprlib.repr(visitor)} does not come to her in {scene}; {', '.join(visitors)} may.")
    if (told := str(persona or "")) and visitor != PASSER_BY:
        raise Refused(f"{visitor} is who he is. Come as {PASSER_BY} to be someone of your own.")
    names = [name for name, default in ((scene, SCENES[0].name), (told or visitor, PASSER_BY)) if name != default]
    cue = f"（{'·'.join(names)}）" if names else ""
    return [{**each, "content": cue + each["content"]} if each["role"] == "user" else each for each in messages]
