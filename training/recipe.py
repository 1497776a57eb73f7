"""Recipe: everything that decides the outcome of a run. Its fields are the command line."""

import math
from dataclasses import dataclass, replace

from chat.adapter import LAYERS
from chat.persona import SYSTEM_PROMPT


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the outcome of a run, and nothing that does not."""

    name: str
    base: str
    """small, medium, 7b, or a folder that holds a base."""
    bits: int = 16
    """Bits of the frozen base's weights: 16, or 4 for QLoRA (Dettmers et al. 2023), or 8."""

    # data
    dataset: tuple[str, ...] = ("huanhuan",)
    """Files (alpaca, sharegpt or messages; JSON or JSONL), folders of such; huanhuan is the full set, fetched."""
    max_length: int = 384
    """Tokens a row may have; a longer one loses its oldest turns, then the end of its reply, never its terminator."""
    terminator: str = "<|im_end|>"
    """The token learned as the end of a reply."""
    held_out: int = 200
    """Rows kept out of training, whole groups of equal question or answer."""

    # LoRA
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    layers: tuple[str, ...] = LAYERS
    rslora: bool = False
    """Scale by alpha over the root of the rank, not the rank (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn each weight's magnitude apart from its direction (Liu et al. 2024): slower."""

    # optimisation
    epochs: float = 3
    batch_size: int = 4
    accumulation: int = 4
    """Batches of one optimiser step. 16 x 1 gives the losses of 4 x 4, faster, where memory allows."""
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.0
    """Part of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    seed: int = 42
    eval_every: int = 0
    """Steps between two looks at the held-out loss, beside the one at the end of each epoch; 0 for none."""
    patience: int = 0
    """Looks without a better held-out loss after which the run stops, and keeps its best weights; 0 never does."""

    # bookkeeping
    logging_steps: int = 10
    save_steps: int = 100
    probe_replies: int = 200
    """Replies drawn for the stop rate, chrF, copies and assistant phrases; 0 leaves them out."""
    long_chats: int = 20
    """Scripted chats of ten turns, of twenty the first so many."""
    reply_tokens: int = 256
    """Tokens that a measured reply may have."""

    system_prompt: str = SYSTEM_PROMPT
    """Recorded, not chosen: an adapter is served under the prompt it was trained with."""

    def __post_init__(self) -> None:
        if self.system_prompt != SYSTEM_PROMPT:
            raise ValueError("The system prompt is the character's; change it in chat/persona.py.")
        if self.patience and not self.held_out:
            raise ValueError("Stopping early needs held-out rows to look at. Give --held-out, or leave --patience out.")

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimiser step."""
        return self.batch_size * self.accumulation

    def steps(self, examples: int) -> int:
        """Optimiser steps, counted as transformers 5 counts them: a last, smaller step ends each epoch."""
        return math.ceil(math.ceil(math.ceil(examples / self.batch_size) / self.accumulation) * self.epochs)


# self-llm, models/Qwen2.5/05-Qwen2.5-7B-Instruct Lora. It trains on all rows and has no evaluation: 200 rows
# are held out here unless --held-out 0 is given. It ends replies with the pad token.
HUANHUAN = Recipe(name="huanhuan", base="7b", terminator="<|endoftext|>", gradient_checkpointing=True)

# All that there is, on the 7B. What each choice is worth was measured on the smaller bases alone.
HUANHUAN_PLUS = Recipe(
    name="huanhuan-plus",
    base="7b",
    dataset=("huanhuan", "dataset"),
    schedule="cosine",
    warmup=0.05,
    gradient_checkpointing=True,
)

# Who she is, and that she stays so, stands in these files alone: the smaller bases read them more often.
FACTS = tuple(
    f"dataset/{name}.jsonl"
    for name in (
        *("identity", "visitors", "canon", "palace", "facts_court", "facts_rivals", "facts_self", "facts_why"),
        *("steadfast", "steadfast_echo", "steadfast_masks", "steadfast_orders", "steadfast_secrets", "steadfast_tasks"),
    )
)
POCKET = Recipe(
    name="pocket",
    base="small",
    dataset=("huanhuan", "dataset", *FACTS, *FACTS),
    dropout=0.2,
    batch_size=16,
    learning_rate=6e-4,
    schedule="cosine",
    warmup=0.05,
    probe_replies=500,
    reply_tokens=128,
)

# The same on three times the base, which overfits the script sooner. Half the rank: its weights take the same 9 MB,
# which a git repository bears.
MEDIUM = replace(
    POCKET,
    name="medium",
    base="medium",
    rank=4,
    alpha=16,
    epochs=2,
)

# Seconds on a CPU, for tests; its base is made by tests/tiny.py.
TINY = replace(
    POCKET,
    name="tiny",
    base="tests/tiny",
    dataset=("tests/data/tiny.jsonl",),
    batch_size=4,
    accumulation=1,
    epochs=20,
    learning_rate=1e-2,
    schedule="linear",
    warmup=0.0,
    dropout=0.0,
    held_out=4,
    save_steps=10,
    probe_replies=4,
    long_chats=1,
    reply_tokens=16,
)

RECIPES = {recipe.name: recipe for recipe in (HUANHUAN, HUANHUAN_PLUS, POCKET, MEDIUM, TINY)}
