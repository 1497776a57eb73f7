"""The base's tokenizer and chat template out of its GGUF file, without transformers or torch.

The same library, `tokenizers`, encodes here and in training; only the way to its vocabulary differs. `gguf`'s own
reader takes 5.7 s for what is read here in 0.1 s, as it makes an array of each of 300,000 strings.
"""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from chat.download import Unavailable

# struct's letters for GGUF's scalar types (ggml/docs/gguf.md); 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4  # token types: `<|im_end|>` and the like; `<tool_call>`, which is text as well
# How Qwen2 splits text before merging (transformers, models/qwen2/tokenization_qwen2.py).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GgufTokenizer:
    """What `chat.prompt` asks of a tokenizer, with the names that transformers gives it."""

    def __init__(self, path: Path) -> None:
        """Read a GGUF file. Raises Unavailable when it is damaged or holds no tokenizer of Qwen2's kind."""
        try:
            metadata = read_metadata(path)
            tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
            merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
            template, end = metadata["tokenizer.chat_template"], metadata["tokenizer.ggml.eos_token_id"]
            if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "qwen2"):
                raise ValueError("its tokenizer is not Qwen2's")
            self.eos_token: str = tokens[end]
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
            what = f"{path} cannot be read as a GGUF of Qwen2.5 ({error})"
            raise Unavailable(f"{what}. Delete it and start again.") from error
        vocabulary = {token: n for n, token in enumerate(tokens)}
        self.backend_tokenizer = tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ])  # fmt: skip
        # As transformers renders templates: sandboxed from Python, and blocks leave no blank lines.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(template)

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: Literal[False], add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation by the base's own template."""
        return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]:
        """Token ids of each text; control tokens in it become themselves."""
        encoded = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded]}


def read_metadata(path: Path) -> dict[str, Any]:
    """All keys and values in the head of a GGUF file, version 3. Raises OSError, ValueError or struct.error."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, _, count = struct.unpack("<4sIQQ", data.read(24))
        if (magic, version) != (b"GGUF", 3):
            raise ValueError("it does not begin as a GGUF of version 3")
        return {_value(data, STRING): _value(data, _scalar(data, "I")) for _ in range(count)}


def _scalar(data: mmap.mmap, letter: str) -> Any:
    (value,) = struct.unpack(f"<{letter}", data.read(struct.calcsize(f"<{letter}")))
    return value


def _value(data: mmap.mmap, kind: int) -> Any:
    """The value at the file's position, which moves behind it."""
    if kind not in (STRING, ARRAY):
        return _scalar(data, SCALARS[kind])
    element = _scalar(data, "I") if kind == ARRAY else None
    if (length := _scalar(data, "Q")) > len(data):
        raise ValueError("a string or an array in it is longer than the file")
    return data.read(length).decode() if element is None else [_value(data, element) for _ in range(length)]
