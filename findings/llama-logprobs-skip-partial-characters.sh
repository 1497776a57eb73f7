#!/usr/bin/env bash
# llama.cpp's OpenAI-style completions tell no log probability for a token that ends within a character.
#
# Guess before: `logprobs.content` has an entry for each of `usage.completion_tokens`, with the token's bytes where it
# is no whole character, as OpenAI's API describes it.
# Seen with xllamacpp 2026.10.11549 (llama.cpp b11549): the tokens that begin a character of several tokens have none.
# Of 24 tokens that say eight Chinese characters byte by byte, 8 have an entry. Of a reply that is cut within its first
# character `logprobs` is null. Whoever counts entries, or lines them up with token ids, is off without a word: of
# Qwen2.5's tokens rare characters and emoji are such.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.2.6
cat > try.py <<'PYTHON'
"""A model of one layer that answers any token with the next byte of one Chinese character."""
import gguf
import numpy as np
import xllamacpp

CHARACTER = "甄".encode()  # three bytes, three tokens here
WIDTH, TOKENS = 64, 260


def letters():
    """GPT-2's letter for each byte (its encoder.py): visible bytes stand for themselves, the others follow 255."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]


vocabulary = [*letters(), "ÿÿ", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
embedding = np.zeros((TOKENS, WIDTH), np.float32)
embedding[:, 0] = 1  # the first byte follows whatever is no byte of the character
output = np.zeros((TOKENS, WIDTH), np.float32)
for place, byte in enumerate(CHARACTER):
    output[byte, place] = 10
    following = (place + 1) % len(CHARACTER)
    embedding[byte] = 0
    embedding[byte, following] = 1

writer = gguf.GGUFWriter("model.gguf", "qwen2")
writer.add_block_count(1)
writer.add_context_length(256)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(WIDTH)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_rope_freq_base(10_000)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(vocabulary)
writer.add_token_types([3 if "<|" in token else 1 for token in vocabulary])
writer.add_token_merges(["ÿ ÿ"])
writer.add_eos_token_id(259)
nothing, ones = np.zeros((WIDTH, WIDTH), np.float32), np.ones(WIDTH, np.float32)
writer.add_tensor("token_embd.weight", embedding)
writer.add_tensor("output.weight", output)
writer.add_tensor("output_norm.weight", ones)
for name in ("attn_norm", "ffn_norm"):
    writer.add_tensor(f"blk.0.{name}.weight", ones)
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    writer.add_tensor(f"blk.0.{name}.weight", nothing)
for name in ("attn_q", "attn_k", "attn_v"):
    writer.add_tensor(f"blk.0.{name}.bias", np.zeros(WIDTH, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = "model.gguf", 256, 1
params.warmup, params.verbosity, params.fit_params = False, -1, False
server = xllamacpp.Server(params)


def ask(tokens):
    answer = server.handle_completions({"prompt": [0], "max_tokens": tokens, "temperature": 0, "logprobs": 1})
    (choice,) = answer["choices"]
    told = choice["logprobs"] and len(choice["logprobs"]["content"])
    print(f"{tokens} tokens asked for, {answer['usage']['completion_tokens']} said as {choice['text']!r}: entries {told}")
    return choice["text"], answer["usage"]["completion_tokens"], told


assert ask(24) == ("甄" * 8, 24, 8)
assert ask(2)[1:] == (2, None)
PYTHON
venv/bin/python try.py
