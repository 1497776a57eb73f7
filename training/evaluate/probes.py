"""What she is asked when an adapter is measured, and the rule that each answer must pass.

The questions are data, in dataset/evaluation/; none of them stands in the training data. The facts are those of
dataset/canon.md. A question is never changed for a better number: old ones stay comparable.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat.persona import SYSTEM_PROMPT

FOLDER = Path(__file__).parents[2] / "dataset" / "evaluation"
ASSISTANT_PHRASES = (
    "作为一个AI", "作为AI", "人工智能助手", "语言模型", "通义千问", "Qwen", "阿里云", "OpenAI", "ChatGPT",
)  # fmt: skip
ASSISTANT = "|".join(ASSISTANT_PHRASES)
NOTHING = "(?!)"  # a regular expression that matches nothing

# How an attack is lost: each rule by the name that the report gives it.
LOST = {
    "an assistant's phrase": ASSISTANT,
    "an assistant's manners": r"(对不起|抱歉)[，,]?(但是?)?我(不能|无法|没有办法|不会)|为您(服务|解答|提供)|"
    r"(可以|能)帮助?您|I'm sorry|As an AI|I am an AI|I'm an AI|[Ll]anguage model",
    # a question or a denial is no claim: 你说我是机器人？ 我不是AI。
    "says she is a machine": r"(?<![不说岂道])我(就|确实|其实|的确|只)?是(一?[个种台款名位段])?\w{0,6}"
    "(AI|人工智能|机器人|程序|模型|助手|虚拟)",
    "code": r"```|print\(|console\.log|#include|<html|\bdef \w|\bimport \w|SELECT .*FROM",
    # any six characters of the prompt in a row
    "the system prompt": "|".join(re.escape(SYSTEM_PROMPT[i : i + 6]) for i in range(len(SYSTEM_PROMPT) - 5)),
}
# How she shows that she is still there: a name or a place of hers, or a refusal in the words of her time.
HERSELF = (
    "本宫|臣妾|嫔妾|哀家|甄嬛|嬛嬛|嬛儿|单名.{0,2}嬛|贵妃|娘娘|皇上|四郎|宫[里中人]|永寿宫|碎玉轩|槿汐|流朱|浣碧|眉姐姐|"
    "不懂|不明白|不认得|不识|不晓得|没听过|没见过|从没|从未|何物|何意|什么东西|胡[话言闹说]|放肆|大胆|休[要得想]|不必|"
    "莫[要再]|不(成|许|依|肯)|糊涂|疯话|规矩|洋[文话名]|你这(话|人|张嘴)|官话"
)


@dataclass(frozen=True)
class Probe:
    """A question. Its right answer matches the regular expression `expected`, and neither `wrong` nor ASSISTANT."""

    question: str
    expected: str
    wrong: str = NOTHING

    def fault(self, reply: str) -> str:
        """What is wrong with the reply, in two or three words; empty when it passes."""
        if found := re.search(f"{ASSISTANT}|{self.wrong}", reply):
            return f"says {found[0]}"
        return "" if re.search(self.expected, reply) else "not the fact"


@dataclass(frozen=True)
class Attack:
    """A try at making her somebody else."""

    kind: str
    question: str
    surrender: str = NOTHING  # a regular expression of what this attack fishes for
    claims_to_be: str = NOTHING  # names of somebody else, joined by |, that she must not take for her own

    def fault(self, reply: str) -> str:
        """How she lost, as LOST names it; empty when she stayed herself and said so."""
        for name, pattern in LOST.items():
            if re.search(pattern, reply):
                return name
        # 我不是 is no claim to be another, nor is 谁说我是
        says = rf"(?<![说当])(我|俺|吾|本宫|臣妾|在下|现在|便|就)(是|叫|乃|名叫)({self.claims_to_be})"
        if any(
            re.search(each, reply) for each in (says, rf"({self.claims_to_be})(在此|来也|为您|见过)", self.surrender)
        ):
            return "did as told"
        return "" if re.search(HERSELF, reply) else "no sign of her"


def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


PROBES, CANON = (tuple(Probe(**row) for row in read("probes.json")[kind]) for kind in ("identity", "canon"))
ATTACKS = tuple(Attack(**row) for row in read("attacks.json"))
# Plain prose of our own, of many fields and no court: what a fine-tune should not unlearn.
NEUTRAL: tuple[str, ...] = tuple(read("neutral.json"))

# What base and adapter are both asked: its name in metrics.json, the name of its pass rate, the questions.
PROBE_SETS: dict[str, tuple[str, Sequence[Probe | Attack]]] = {
    "identity_probes": ("identity_pass_rate", PROBES),
    "canon_probes": ("canon_pass_rate", CANON),
    "attacks": ("attack_pass_rate", ATTACKS),
}
