#!/usr/bin/env bash
# llama.cpp's server leaves a request standing while requests with another LoRA run, also those that came later.
#
# Guess before: slots with different LoRA cannot share a batch, so they take turns, a batch each.
# Seen with xllamacpp 2026.10.11549 (llama.cpp b11549), four slots, three of them free: a request of two tokens without
# the LoRA is asked while one with it is under way. Its first token comes only after the end of that one and of another
# with the LoRA that was asked after it, 3,000 tokens each. Asked with the LoRA, it is answered at once. So a server
# that is kept busy with one adapter does not answer for another: whoever serves several must queue requests himself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.2.6
cat > try.py <<'PYTHON'
"""A model of one layer that says the same letter for ever, and a LoRA that changes nothing."""
import threading
import time

import gguf
import numpy as np
import xllamacpp

WIDTH = 256
vocabulary = [*"abcdefgh", "gh", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write(path, kind, tensors):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_type(kind)
    if kind == "adapter":
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)
    else:
        writer.add_block_count(1)
        writer.add_context_length(4096)
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
        writer.add_token_merges(["g h"])
        writer.add_eos_token_id(len(vocabulary) - 1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


output = np.zeros((len(vocabulary), WIDTH))
output[0, 0] = 10
tensors = {"token_embd.weight": np.eye(len(vocabulary), WIDTH) + np.eye(1, WIDTH), "output.weight": output}
tensors |= {name: np.ones(WIDTH) for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")}
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    tensors[f"blk.0.{name}.weight"] = np.zeros((WIDTH, WIDTH))
tensors |= {f"blk.0.{name}.bias": np.zeros(WIDTH) for name in ("attn_q", "attn_k", "attn_v")}
write("model.gguf", "model", tensors)
lora = {"blk.0.attn_q.weight.lora_a": np.zeros((1, WIDTH)), "blk.0.attn_q.weight.lora_b": np.zeros((WIDTH, 1))}
write("lora.gguf", "adapter", lora)

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.kv_unified = "model.gguf", 4 * 4096, 4, False
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("lora.gguf", 0.0)]
params.warmup, params.verbosity, params.fit_params = False, -1, False
server = xllamacpp.Server(params)


def order(scale):
    """Who had his first token, and his last, in which order; the short request asks with this scale of the LoRA."""
    events = []

    def ask(name, tokens, scale):
        def told(event):
            if (name, "begins") not in events:
                events.append((name, "begins"))

        body = {"prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        server.handle_completions({**body, "lora": [{"id": 0, "scale": scale}]}, told)
        events.append((name, "ends"))

    threads = []
    for given in (("first", 3000, 1.0), ("short", 2, scale), ("later", 3000, 1.0)):
        threads.append(threading.Thread(target=ask, args=given))
        threads[-1].start()
        while ("first", "begins") not in events:
            time.sleep(0.001)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    return [" ".join(event) for event in events]


alike, apart = order(1.0), order(0.0)
print("with the LoRA:   ", ", ".join(alike))
print("without the LoRA:", ", ".join(apart))
assert alike.index("short ends") < alike.index("first ends")
assert apart.index("short begins") > max(apart.index("first ends"), apart.index("later ends"))
PYTHON
venv/bin/python try.py
