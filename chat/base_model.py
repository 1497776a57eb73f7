"""A base in transformers, for serving and training: its tokenizer, its weights, its sampling."""

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from chat.bases import MEMORY_7B
from chat.checkpoints import Checkpoint
from chat.engine import REPLY_SECONDS
from chat.machine import ZERO_GPU
from chat.sampling import Sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from chat.adapter import Adapter

END, PAD = "<|im_end|>", "<|endoftext|>"


def load_tokenizer(checkpoint: Checkpoint) -> "PreTrainedTokenizerFast":
    """The base's own tokenizer, whose template is the only template."""
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(checkpoint.path))


def best_device() -> str:
    """The GPU where there is one; ZeroGPU announces one at all times, but lends it only while a reply is generated."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_bits(bits: int) -> None:
    """Raise ValueError, with what to do, where a base cannot be loaded in so many bits."""
    if bits not in MEMORY_7B:
        raise ValueError(f"No base has weights of {bits} bits. Choose --bits from {', '.join(map(str, MEMORY_7B))}.")
    if bits != 16 and os.environ.get(ZERO_GPU):
        raise ValueError("bitsandbytes reads a base onto the GPU, which ZeroGPU lends only later. Leave --bits out.")
    if bits != 16 and not find_spec("bitsandbytes"):
        raise ValueError(
            f"{bits} bits need bitsandbytes, which is not here. Install it, `.venv/bin/pip install -c constraints.txt "
            "-r requirements-bits.txt`, or leave --bits out."
        )


def load_base(checkpoint: Checkpoint, device: str | None = None, bits: int = 16) -> "PreTrainedModel":
    """The base, on the best device unless told: bf16 where there is a GPU, else fp32; a CPU gains little from bf16.

    In 4 bits (NF4, the scales quantised too) or 8 (LLM.int8) it always takes the best device, and only the linear
    layers have fewer bits. Raises ValueError as `require_bits` does.
    """
    require_bits(bits)
    # cuDNN's attention gave NaN gradients and is chosen by default for packed rows on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = torch.bfloat16 if best_device() == "cuda" else torch.float32
    quantization = None
    if bits != 16:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast at each product of 8 bits
        quantization = BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, quantization_config=quantization)
    if not quantization:
        model.to(device or best_device())
    for module in model.modules():
        # A CPU with AVX512-BF16 would pack 4 bits anew at the first reply, and no gradient would pass from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config._name_or_path = model.name_or_path = checkpoint.base.name  # PEFT writes it into adapter_config.json
    model.generation_config = GenerationConfig()  # generation_config() below says everything
    return cast("PreTrainedModel", model.eval())


def add_adapter(model: Any, adapter: "Adapter", in_fp32: bool) -> "PeftModel":
    """A base, or one with adapters, with one more: of the adapter's config PEFT sees only what the gate has checked."""
    from peft import LoraConfig, PeftModel, get_peft_model  # takes two seconds

    lora = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **adapter.lora)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter.name, lora, autocast_adapter_dtype=in_fp32)
    else:
        model = get_peft_model(model, lora, adapter.name, autocast_adapter_dtype=in_fp32)
    model.load_adapter(str(adapter.folder), adapter.name)
    return cast("PeftModel", model.eval())


def ends(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Both terminators: the template's `<|im_end|>` and the tutorial's `<|endoftext|>`."""
    return cast("list[int]", tokenizer.convert_tokens_to_ids([END, PAD]))


def generation_config(tokenizer: "PreTrainedTokenizerFast", sampling: Sampling) -> GenerationConfig:
    """Our sampling, written out in full: what a base folder says is not relied on."""
    parameters, (end, pad) = sampling.parameters(), ends(tokenizer)
    if greedy := sampling.temperature == 0:
        parameters = {name: parameters[name] for name in ("max_new_tokens", "repetition_penalty")}
    return GenerationConfig(
        **parameters, max_time=REPLY_SECONDS, do_sample=not greedy, eos_token_id=[end, pad], pad_token_id=pad
    )
