"""Drawing replies for an evaluation: many conversations in one batch, and long chats turn by turn."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from chat.base_model import ends, generation_config
from chat.engine import PROMPT_TOKENS
from chat.persona import Message, with_scene
from chat.prompt import trim
from chat.sampling import Sampling
from training.evaluate.long_chats import LongChat
from training.evaluate.scores import SEED


@torch.inference_mode()
def generate_replies(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[Message]], sampling: Sampling, batch_size: int = 100
) -> Iterator[tuple[str, bool]]:
    """Her reply to each conversation, and whether she ended it herself.

    Prompts are trimmed as on the page, and padded on the left. The same seed draws the same replies
    only with the same batches.
    """
    torch.manual_seed(SEED if sampling.seed is None else sampling.seed)
    was_training = model.training
    model.eval()
    config = generation_config(tokenizer, sampling)
    config.max_time = None  # a batch takes as long as it takes
    stop = torch.tensor(ends(tokenizer))
    starts = range(0, len(conversations), batch_size)
    for start in tqdm(starts, desc="replies", unit="batch", disable=len(starts) < 2):
        batch = conversations[start : start + batch_size]
        prompts = [trim(tokenizer, messages, PROMPT_TOKENS)[1] for messages in batch]
        longest = max(map(len, prompts))
        ids = torch.tensor([[int(stop[1])] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for row in out[:, longest:].cpu():
            yield str(tokenizer.decode(row, skip_special_tokens=True)), bool(torch.isin(row, stop).any())
    model.train(was_training)


def generate_long_chats(model: Any, tokenizer: Any, chats: Sequence[LongChat], sampling: Sampling) -> list[list[str]]:
    """Her replies in each chat, all chats together turn by turn; turn n, counted from 0, has the seed SEED + n."""
    histories: list[list[Message]] = [[] for _ in chats]
    for n in range(len(chats[0].lines) if chats else 0):
        for messages, chat in zip(histories, chats, strict=True):
            messages.append({"role": "user", "content": chat.lines[n]})
        asked = [with_scene(messages, c.scene, c.visitor) for messages, c in zip(histories, chats, strict=True)]
        replies = generate_replies(model, tokenizer, asked, replace(sampling, seed=SEED + n))
        for messages, (text, _) in zip(histories, replies, strict=True):
            messages.append({"role": "assistant", "content": text})
    return [[message["content"] for message in messages if message["role"] == "assistant"] for messages in histories]
