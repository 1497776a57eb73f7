"""Recipe, which decides the outcome of a run, and Run, which says what to do around it. Both are the command line."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from chat.adapter import LAYERS, MAX_RANK
from chat.checkpoints import read_json
from chat.files import write_text
from chat.persona import SYSTEM_PROMPT
from training.data import VALIDATION_ROWS

# Field of an older recipe.json, and its flag → the field's name now. Published adapters keep their files.
RENAMED = {"accumulation": "gradient_accumulation_steps", "held_out": "validation_rows"}


MANY = 10**9
# Lowest and highest value of a number; the gate of chat/adapter.py would refuse some of the others after hours.
RANGES = {
    "max_length": (1, 32_768), "validation_rows": (0, MANY), "rank": (1, MAX_RANK), "alpha": (1, 4096),
    "dropout": (0, 0.99), "epochs": (0.001, 10_000), "batch_size": (1, MANY), "gradient_accumulation_steps": (1, MANY),
    "learning_rate": (1e-12, 1), "warmup": (0, MANY), "weight_decay": (0, 1), "max_grad_norm": (1e-6, MANY),
    "seed": (0, 2**32 - 1), "eval_every": (0, MANY), "patience": (0, MANY), "logging_steps": (1, MANY),
    "save_steps": (1, MANY), "probe_replies": (0, MANY), "long_chats": (0, MANY), "talk_lines": (0, MANY),
    "reply_tokens": (1, 4096),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the outcome of a run, and nothing that does not."""

    name: str
    base: str  # small, medium, 7b, or a folder that holds a base.
    bits: int = 16  # Bits of the frozen base's weights: 16, or 4 for QLoRA (Dettmers et al. 2023), or 8.

    # data
    dataset: tuple[str, ...] = ("huanhuan",)
    """Files (JSON, CSV, Parquet), folders of them, USER/NAME on the Hub; huanhuan is the full set, fetched."""
    system: Literal["hers", "own"] = "hers"
    """hers: a row with another system prompt is refused. own: such a row is learned under its own prompt."""
    skip_bad_rows: bool = False  # Leave out rows that cannot be learned, and count them, instead of refusing all.
    max_length: int = 384
    """Tokens a row may have; a longer one loses its oldest messages, then its reply's end."""
    end_cut_replies: bool = False  # Learn the terminator behind a reply that lost its end, too.
    terminator: Literal["<|im_end|>", "<|endoftext|>"] = "<|im_end|>"  # The token learned as the end of a reply.
    validation_rows: int = VALIDATION_ROWS
    """Rows held out of training, in whole groups of equal question or answer; the default is at most a tenth of all."""

    # LoRA
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    layers: tuple[str, ...] = LAYERS
    rslora: bool = False  # Scale by alpha over the root of the rank, not the rank (Kalajdzievski 2023).
    dora: bool = False  # Learn each weight's magnitude apart from its direction (Liu et al. 2024): slower.

    # optimisation
    epochs: float = 3
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    """Batches of one optimiser step. 16 x 1 gives the losses of 4 x 4, faster, where memory allows."""
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.0  # Part of the steps in which the learning rate rises.
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False  # Less memory, a third more time.
    seed: int = 42
    eval_every: int = 0
    """Steps between two measurements of the held-out loss, beside that at the end of each epoch; 0 for none."""
    patience: int = 0
    """Measurements without a better held-out loss after which the run stops and keeps its best weights; 0: never."""

    # bookkeeping
    logging_steps: int = 10
    save_steps: int = 100
    probe_replies: int = 200  # Replies drawn for the stop rate, chrF, copies and assistant phrases; 0 leaves them out.
    long_chats: int = 20  # Scripted chats of ten messages to measure: the first so many of twenty.
    talk_lines: int = 120  # Everyday lines to measure: the first so many of 120; all bring the talks of six turns.
    reply_tokens: int = 256  # Tokens that a measured reply may have, everyday talk aside.
    system_prompt: str = SYSTEM_PROMPT
    """Recorded, not chosen: an adapter is served under the prompt it was trained with."""

    def __post_init__(self) -> None:
        if self.system_prompt != SYSTEM_PROMPT:
            raise ValueError("The system prompt is the character's; change it in chat/persona.py.")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise ValueError(f"{name} is {getattr(self, name)}. Give --{flag} a number from {low} to {high}.")
        if self.patience and not self.validation_rows:
            raise ValueError("Stopping early needs held-out rows. Give --validation-rows, or leave --patience out.")

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps(self, examples: int) -> int:
        """Optimiser steps, counted as transformers 5 counts them: a last, smaller step ends each epoch."""
        batches = math.ceil(examples / self.batch_size)
        return math.ceil(math.ceil(batches / self.gradient_accumulation_steps) * self.epochs)

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe of a recipe.json, also of one with older names. Raises ValueError for a field that is unknown.

        A field that is missing there has its default: it was the only choice when the file was written.
        """
        recorded = read_json(path).items()
        values: dict[str, Any] = {RENAMED.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in recorded}
        if unknown := values.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"{path} has {', '.join(sorted(unknown))}, which no recipe knows. Update this program.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is no recipe ({error}). Copy the folder again.") from error

    def write(self, path: Path) -> None:
        """Write it as recipe.json, whole or not at all."""
        write_text(path, json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe, and what to do around it."""

    recipe: Recipe
    output: Path | None = None  # The adapter folder to write; adapters/NAME by default.
    work: Path | None = None  # Where checkpoints and the TensorBoard log go; runs/NAME by default.
    profile: Literal["auto", "faithful", "fast"] = "auto"
    """faithful: the stock Trainer. fast: the same steps, computed by qwen2/training_step.py. auto: fast on a GPU."""
    resume: bool = False  # Go on from the last checkpoint, exact to the bit.
    push: str | None = None  # USER/NAME on the Hub; the permission to write is checked before training.
    push_modelscope: str | None = None  # USER/NAME on ModelScope; the permission is checked before training, too.
    private: bool = False  # A repository that the push creates is seen by you alone.
    pr: bool = False  # Push to the Hub as a pull request on a repository that exists.
    save_on_each_node: bool = False
    """Of several machines that share no disk, each gets the checkpoints and the adapter."""


# self-llm, models/Qwen2.5/05-Qwen2.5-7B-Instruct Lora. It trains on all rows and has no evaluation: 200 rows
# are held out here unless --validation-rows 0 is given. It ends replies with the pad token.
HUANHUAN = Recipe(
    name="huanhuan", base="7b", terminator="<|endoftext|>", end_cut_replies=True, gradient_checkpointing=True
)

# Only these files teach who she is and that she stays so.
FACTS = tuple(f"dataset/{name}.jsonl" for name in (
    "identity", "visitors", "canon", "palace", "facts_court", "facts_rivals", "facts_self", "facts_why", "steadfast",
    "steadfast_echo", "steadfast_masks", "steadfast_orders", "steadfast_secrets", "steadfast_tasks",
))  # fmt: skip
# Everyday talk: talks of up to eight turns,
TALK = tuple(f"dataset/{name}.jsonl" for name in (
    "talk_family", "talk_grown", "talk_hard", "talk_her", "talk_long", "talk_pushing", "talk_scenes", "talk_small",
    "talk_work", "talk_young", "daily", "heart", "longtalk", "modern",
))  # fmt: skip
# and single lines with plain replies, which a small base can learn.
PLAIN = "dataset/talk_plain.jsonl"
OTHERS = tuple(f"dataset/{name}.jsonl" for name in (
    "people", "refusals", "scenes_early", "scenes_late", "scenes_temple",
))  # fmt: skip
# Of the script only the pairs in which her line answers the one before.
ANSWERS = "dataset/huanhuan.rows"

# All our own data on the 7B, talk twice; its witty replies too. What each choice is worth was measured on the smaller
# bases only.
HUANHUAN_PLUS = Recipe(
    name="huanhuan-plus", base="7b", dataset=(ANSWERS, "dataset", *TALK, PLAIN), schedule="cosine", warmup=0.05,
    gradient_checkpointing=True,
)  # fmt: skip

# The smaller bases read facts twice, too: read once they forget who is who (canon probes 25 to 30 points lower). They
# leave out talk_witty: of wit they learn the sound without the sense.
POCKET = Recipe(
    name="pocket", base="small", dataset=(ANSWERS, *FACTS * 2, *OTHERS, *TALK, *[PLAIN] * 2), batch_size=16, epochs=2,
    learning_rate=4e-4, schedule="cosine", warmup=0.05, probe_replies=500, reply_tokens=128,
)  # fmt: skip

# Three times the base. It reads each reply as often in one epoch, and forgets less. Half the rank: its weights take the
# same 9 MB, which a git repository bears.
MEDIUM = replace(
    POCKET, name="medium", base="medium", dataset=(ANSWERS, *FACTS * 3, *OTHERS, *TALK, *[PLAIN] * 3), rank=4, alpha=16,
    epochs=1,
)  # fmt: skip

# For tests: it takes seconds on a CPU. tests/tiny.py makes its base.
TINY = replace(
    POCKET, name="tiny", base="tests/tiny", dataset=("tests/data/tiny.jsonl",), validation_rows=4,
    dropout=0.0, epochs=20, batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, schedule="linear",
    warmup=0.0, save_steps=10, probe_replies=4, long_chats=1, talk_lines=0, reply_tokens=16,
)  # fmt: skip

RECIPES = {recipe.name: recipe for recipe in (HUANHUAN, HUANHUAN_PLUS, POCKET, MEDIUM, TINY)}
