"""Example to ids and labels, as the chat's own prompt: only the reply is learned."""

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Protocol

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from chat.bases import BASES
from chat.checkpoints import on_disk, read_json
from chat.gguf_tokenizer import GgufTokenizer
from chat.prompt import escape_special_tokens
from qwen2 import IGNORE_INDEX
from training.formats import Example, first_of

log = logging.getLogger(__name__)

START = "<|im_start|>"  # opens each message in ChatML, and stands in no message: see escape_special_tokens
BATCH = 1024  # dialogues tokenized at once: enough for all cores, few enough for flat memory


class TemplateTokenizer(Protocol):
    """What is asked of a tokenizer here, by the names that transformers gives it."""

    @property
    def backend_tokenizer(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: Any, add_generation_prompt: bool) -> Any: ...


class Encoded:
    """One row: ids and labels of one length, kept in 4 bytes each; a label is IGNORE_INDEX or the id itself."""

    __slots__ = ("_input_ids", "_labels", "cut", "ends", "full_length")

    def __init__(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int],
        full_length: int = 0,
        cut: bool = False,
        ends: bool = True,
    ) -> None:
        """`full_length`: tokens the row has uncut; `cut`: its reply lost its end; `ends`: it ends on its terminator."""
        self._input_ids, self._labels = array("i", input_ids), array("i", labels)
        self.full_length, self.cut, self.ends = full_length or len(input_ids), cut, ends

    @property
    def input_ids(self) -> list[int]:
        return self._input_ids.tolist()

    @property
    def labels(self) -> list[int]:
        return self._labels.tolist()

    def __len__(self) -> int:
        return len(self._input_ids)

    @property
    def learned(self) -> int:
        """Target tokens: those that enter the loss, the terminator among them."""
        return len(self._labels) - self._labels.count(IGNORE_INDEX)


def encode(
    tokenizer: TemplateTokenizer, examples: Sequence[Example], max_length: int, terminator: str,
    end_cut_replies: bool = False,
) -> list[Encoded]:  # fmt: skip
    """Ids of prompt and reply of each example, at most `max_length`.

    A row too long loses its oldest messages first, then the end of its reply. A reply that lost its end does not end
    on the terminator unless `end_cut_replies`: the model would learn to stop in mid-sentence. Raises ValueError naming
    file and line of each question that alone leaves no room for a reply.
    """
    rows: list[Encoded] = []
    faults: list[str] = []
    for row in encode_each(tokenizer, examples, max_length, terminator, end_cut_replies):
        if isinstance(row, str):
            faults.append(row)
        else:
            rows.append(row)
    if faults:
        raise ValueError("\n".join(first_of(faults)))
    return rows


def fitting(
    tokenizer: TemplateTokenizer, examples: Sequence[Example], max_length: int, terminator: str
) -> list[Example]:
    """The examples whose question leaves room for a reply; how many do not is logged."""
    rows = encode_each(tokenizer, examples, max_length, terminator)
    kept = [example for example, row in zip(examples, rows, strict=True) if not isinstance(row, str)]
    if left := len(examples) - len(kept):
        log.warning("%d rows are left out: their questions leave no room for a reply.", left)
    return kept


def encode_each(
    tokenizer: TemplateTokenizer, examples: Iterable[Example], max_length: int, terminator: str,
    end_cut_replies: bool = False,
) -> Iterator[Encoded | str]:  # fmt: skip
    """As `encode`, one by one in order, with a sentence in place of each row whose question leaves no room.

    A dialogue is rendered and tokenized once, message by message, however many of its replies are learned.
    """
    end = tokenizer.backend_tokenizer.token_to_id(terminator)
    if end is None:
        raise ValueError(f"The base's tokenizer has no {terminator}. Name another --terminator.")
    dialogues = _dialogues(examples)
    while batch := list(islice(dialogues, BATCH)):
        segments = [_segments(tokenizer, dialogue[-1]) for dialogue in batch]
        replies = [escape_special_tokens(example.answer) for dialogue in batch for example in dialogue]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([*chain(*segments), *replies], add_special_tokens=False)
        ids = iter([each.ids for each in encoded])
        tokenized = [list(islice(ids, len(texts))) for texts in segments]
        for dialogue, parts in zip(batch, tokenized, strict=True):
            head, *messages, opening = parts
            lengths = [0, *accumulate(map(len, messages))]  # tokens before each message
            for example in dialogue:
                reply = [*next(ids), end]
                around, count = len(head) + len(opening), len(example.messages)
                whole = around + lengths[count] + len(reply)
                start, room = 0, max_length - len(reply)
                if whole > max_length:
                    room = max(1, max_length - max(2, min(len(reply), max_length // 2)))
                    start = _first_that_fits(example, lengths, room - around)
                prompt = [*head, *chain(*messages[start:count]), *opening]
                if len(prompt) > room:
                    yield (
                        f"{example.where}: the question takes {len(prompt)} tokens, and {room} fit with --max-length "
                        f"{max_length}. Raise it, or shorten the question."
                    )
                    continue
                kept = reply
                if cut := len(prompt) + len(reply) > max_length:
                    kept = reply[: max_length - len(prompt)]
                    kept = [*kept[:-1], end] if end_cut_replies else kept
                labels = [IGNORE_INDEX] * len(prompt) + kept
                yield Encoded(prompt + kept, labels, whole, cut, ends=kept[-1] == end)


def _first_that_fits(example: Example, lengths: Sequence[int], room: int) -> int:
    """The earliest question from which all messages take at most `room` tokens; the last one if none does."""
    first = len(example.messages) - 1
    for start in reversed(range(len(example.messages))):
        if lengths[len(example.messages)] - lengths[start] > room:
            break
        if example.messages[start]["role"] == "user":
            first = start
    return first


def _dialogues(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Neighbours of which each one's messages begin with those of the one before."""
    dialogue: list[Example] = []
    for example in examples:
        before = dialogue[-1].messages if dialogue else ()
        if not dialogue or len(example.messages) <= len(before) or example.system != dialogue[-1].system or (
            example.messages[: len(before)] != before
        ):  # fmt: skip
            if dialogue:
                yield dialogue
            dialogue = []
        dialogue.append(example)
    if dialogue:
        yield dialogue


def _segments(tokenizer: TemplateTokenizer, example: Example) -> list[str]:
    """The prompt by the base's own template, cut before each message: system prompt, messages, opening of the reply.

    A special token ends whatever the tokenizer merges, so the ids of the segments in a row are those of the whole.
    """
    messages: list[dict[str, str]] = [{"role": "system", "content": escape_special_tokens(example.system)}]
    messages += [{"role": m["role"], "content": escape_special_tokens(m["content"])} for m in example.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, *segments = text.split(START)
    if before or len(segments) != len(messages) + 1:
        raise ValueError(f"The base's chat template does not open each message with {START}. Choose another base.")
    return [START + segment for segment in segments]


def length_note(rows: Iterable[Encoded], max_length: int) -> str:
    """How many rows are too long, what they lose, and the flag that helps; empty when none is."""
    long = [row for row in rows if row.full_length > max_length]
    if not long:
        return ""
    cut = [row for row in long if row.cut]
    ends = "and end there" if any(row.ends for row in cut) else "and are not taught to end there"
    lost = [f"{len(cut)} lose the end of the reply {ends}"] if cut else []
    lost += [f"{len(long) - len(cut)} lose their oldest messages"] if len(long) > len(cut) else []
    longest = max(row.full_length for row in long)
    what = f"{len(long)} rows are longer than --max-length {max_length}: {', '.join(lost)}"
    return f"{what}. --max-length {longest} fits all."


def show_row(tokenizer: TemplateTokenizer, row: Encoded) -> str:
    """One row decoded: the part that is only read, the part that is learned, and the terminator by name."""
    backend = tokenizer.backend_tokenizer
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE_INDEX]
    read = row.input_ids[: len(row) - len(learned)]
    text = learned[:-1] if row.ends else learned
    return (
        f"read    ({len(read)} tokens)  {backend.decode(read, skip_special_tokens=False)!r}\n"
        f"learned ({len(learned)} tokens)  {backend.decode(text, skip_special_tokens=False)!r}\n"
        + (f"ends on {backend.id_to_token(learned[-1])} ({learned[-1]})" if row.ends else "is cut: no end is learned")
    )


class FolderTokenizer:
    """The tokenizer and the template of a base folder, without transformers and torch."""

    def __init__(self, folder: Path) -> None:
        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        text = template.read_text(encoding="utf-8") if template.is_file() else _template(folder)
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)

    def apply_chat_template(self, conversation: Any, *, tokenize: Any = False, add_generation_prompt: bool) -> str:
        return self._template.render(messages=conversation, add_generation_prompt=add_generation_prompt)


def _template(folder: Path) -> str:
    return str(read_json(folder / "tokenizer_config.json")["chat_template"])


def base_tokenizer(choice: str) -> TemplateTokenizer | None:
    """The tokenizer of a base that lies on this disk, or None: nothing is fetched. All named bases have the same."""
    for path in [Path(choice)] if choice not in BASES else [p for p in map(on_disk, BASES.values()) if p]:
        if (path / "tokenizer.json").is_file():
            return FolderTokenizer(path)
        if path.is_file():
            return GgufTokenizer(path)
    return None
