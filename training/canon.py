"""The facts of dataset/canon.md as a table: what a reply must not contradict, and what she calls herself when."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

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
    asked: str = r"(?!)"  # matches nothing
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


def _serves(who: str, duty: str, asked: str = r"(?!)") -> Fact:
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
    early = [name for name in re.findall(NOT_YET.get(scene, "(?!)"), reply) if name not in question]
    if early:
        yield f"{early[0]} comes after {scene}. Leave it to a later scene."
