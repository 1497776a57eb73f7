"""training.export: what llama.cpp, Ollama and transformers read is what was learned."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chat.adapter import CONFIG, LAYERS, ROOT, WEIGHTS, _expected_shapes
from chat.base_model import load_base
from chat.bases import SAMPLING, SEVEN_B, SMALL, File, Gguf
from chat.persona import SYSTEM_PROMPT, with_system_prompt
from chat.sampling import Sampling
from training import export

ASK = [{"role": "user", "content": "你是谁？"}]
TALK = [*ASK, {"role": "assistant", "content": "臣妾明白。"}, {"role": "user", "content": " 坐罢。\n"}]


@pytest.fixture
def asked(trained, tiny_base, monkeypatch):
    """A function that gives the command line such arguments, for the tiny adapter or another folder."""

    def ask(*arguments, folder=trained.folder, base=tiny_base):
        named = ["--base", str(base)] if base else []
        monkeypatch.setattr(sys, "argv", ["export", str(folder), *map(str, arguments), *named])
        export.main()

    return ask


def changed(folder, to, **fields):
    """A copy of an adapter folder with other fields in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text(encoding="utf-8"))
    (to / CONFIG).write_text(json.dumps(config | fields))
    return to


@pytest.mark.parametrize("rslora", [False, True])
def test_the_gguf_holds_every_tensor_and_the_scale(asked, trained, tmp_path, rslora):
    folder = changed(trained.folder, tmp_path / "her", use_rslora=rslora)  # as others write it; ours is folded
    asked("--gguf", tmp_path / "her.gguf", folder=folder)
    read = gguf.GGUFReader(tmp_path / "her.gguf")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if rslora else config["r"])
    assert read.get_field("general.type").contents() == "adapter"
    assert read.get_field("adapter.type").contents() == "lora"
    assert read.get_field("general.architecture").contents() == "qwen2"
    assert read.get_field("adapter.lora.alpha").contents() / config["r"] == pytest.approx(scale)
    layers = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
              "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    wanted = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        layer, module, half = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight", name).groups()
        wanted[f"blk.{layer}.{layers[module]}.weight.lora_{half.lower()}"] = tensor.half().numpy()
    found = {tensor.name: tensor.data for tensor in read.tensors}
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_llama_cpp_answers_with_it_as_she_was_taught(asked, tiny_gguf, tmp_path):
    import xllamacpp

    asked("--gguf", tmp_path / "her.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(tiny_gguf.path)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(tmp_path / "her.gguf"), 1.0)]
    params.n_ctx, params.n_parallel, params.cache_ram_mib, params.warmup, params.verbosity = 512, 1, 0, False, -1
    params.cpuparams.n_threads = 1
    asking = {"messages": with_system_prompt(ASK), "temperature": 0, "max_tokens": 40}
    answer = xllamacpp.Server(params).handle_chat_completions(asking)
    assert answer["choices"][0]["message"]["content"] == "臣妾明白。", "what it was taught"


def rendered(template, messages):
    """What Go's text/template makes of a template that knows one range over the messages and their two fields."""
    before, inner, after = re.fullmatch(r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    messages = [inner.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return before + "".join(messages) + after


def test_the_modelfile_says_prompt_template_and_sampling(asked, tokenizer, tmp_path):
    asked("--gguf", tmp_path / "her.gguf", folder=ROOT / "pocket", base=None)
    text = (tmp_path / export.MODELFILE).read_text(encoding="utf-8")
    for messages in (ASK, TALK):
        template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M).group(1)
        wanted = tokenizer.apply_chat_template(with_system_prompt(messages), tokenize=False, add_generation_prompt=True)
        assert rendered(template, with_system_prompt(messages)) == wanted
    lines = text.splitlines()
    assert f'SYSTEM """{SYSTEM_PROMPT}"""' in lines and "ADAPTER ./her.gguf" in lines
    assert f"FROM ./{SMALL.gguf.files[0].name}" in lines
    assert lines[0].startswith("# FROM must point to") and f"huggingface.co/{SMALL.gguf.repo}" in lines[0]
    drawn = dict(re.findall(r"^PARAMETER (?!stop)(\w+) (\S+)$", text, re.M))
    usual = Sampling(temperature=SMALL.temperature)
    assert {name: float(value) for name, value in drawn.items()} == {
        "temperature": usual.temperature, "top_k": usual.top_k, "top_p": usual.top_p, "min_p": 0,
        "repeat_penalty": usual.repetition_penalty, "repeat_last_n": -1,
    }  # fmt: skip
    assert re.findall(r'^PARAMETER stop "(.+)"$', text, re.M) == ["<|im_end|>", "<|endoftext|>"]


def test_a_base_in_parts_or_of_ones_own_says_where_its_gguf_comes_from(checkpoint):
    text = export.modelfile("her.gguf", SEVEN_B)
    first, last = (file.name for file in SEVEN_B.gguf.files)
    assert f"--merge {first} qwen2.5-7b-instruct-q4_k_m.gguf` joins its 2 parts" in text and last not in text
    assert "\nFROM ./qwen2.5-7b-instruct-q4_k_m.gguf\n" in text
    own = export.modelfile("her.gguf", checkpoint.base)
    assert "\nFROM ./BASE.gguf\n" in own and "convert_hf_to_gguf.py makes of tiny." in own
    one = replace(checkpoint.base, gguf=Gguf("me/tiny", "local", (File("tiny.gguf", 1, ""),)))
    assert "\nFROM ./tiny.gguf\n" in export.modelfile("her.gguf", one)


def test_the_gguf_is_written_without_torch_and_says_what_is_next(tmp_path):
    code = "import sys; from training.export import main; main(); assert 'torch' not in sys.modules"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "pocket"), "--gguf", str(tmp_path / "her.gguf")],
        cwd=ROOT.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"her.gguf", export.MODELFILE}
    for message in (f"--lora {tmp_path / 'her.gguf'} --cache-ram 0", "ollama create zhenhuan -f", "LM Studio",
                 SMALL.gguf.files[0].name, SYSTEM_PROMPT):  # fmt: skip
        assert message in ran.stdout


@torch.inference_mode()
def test_the_merged_model_is_base_and_adapter(asked, trained, checkpoint, tokenizer, tmp_path):
    asked("--merged", tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert merged.dtype == torch.bfloat16
    ids = torch.tensor([tokenizer.encode(SYSTEM_PROMPT)])
    plain = load_base(checkpoint)(ids).logits
    adapted = PeftModel.from_pretrained(load_base(checkpoint), trained.folder).eval()(ids).logits
    off = (merged.float()(ids).logits - adapted).norm() / adapted.norm()
    assert off < 0.05 < 0.3 < (plain - adapted).norm() / adapted.norm()


def test_the_merged_folder_is_whole_and_opens_elsewhere(asked, tiny_base, tokenizer, tmp_path):
    asked("--merged", tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["whole"]
    assert {path.name for path in (tmp_path / "whole").glob("*model*")} == {"model.safetensors"}
    opened = AutoTokenizer.from_pretrained(tmp_path / "whole")
    texts = [one.apply_chat_template(with_system_prompt(TALK), tokenize=False) for one in (opened, tokenizer)]
    assert texts[0] == texts[1] and opened.encode(texts[0]) == tokenizer.encode(texts[0])
    assert "chat_template" in json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text(encoding="utf-8"))
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "whole", tiny_base))
    assert config["rope_theta"] == base["rope_parameters"]["rope_theta"]
    sampling = GenerationConfig.from_pretrained(tmp_path / "whole")
    assert {name: getattr(sampling, name) for name in SAMPLING} == SAMPLING and sampling.do_sample
    assert sampling.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def dora(trained, checkpoint, folder):
    """The tiny adapter with magnitudes, as a DoRA that was never trained would have them, but twice as large."""
    from safetensors.torch import save_file

    changed(trained.folder, folder, use_dora=True)
    layers = load_base(checkpoint).state_dict()
    weights = load_file(folder / WEIGHTS)
    stems = {name.rpartition(".lora_")[0] for name in weights}
    sizes = {f"{stem}.lora_magnitude_vector": 2 * layers[f"{stem.removeprefix('base_model.model.')}.weight"].norm(dim=1)
             for stem in stems}  # fmt: skip
    save_file(weights | sizes, folder / WEIGHTS)
    return folder


@torch.inference_mode()
def test_a_dora_is_merged_but_is_no_gguf(asked, trained, checkpoint, tokenizer, tmp_path):
    folder = dora(trained, checkpoint, tmp_path / "her")
    with pytest.raises(SystemExit, match=r"her is a DoRA, which llama\.cpp does not know.*--merged"):
        asked("--gguf", tmp_path / "her.gguf", folder=folder)
    assert not list(tmp_path.glob("*gguf*")) and not (tmp_path / export.MODELFILE).exists()
    asked("--merged", tmp_path / "whole", folder=folder)
    ids = torch.tensor([tokenizer.encode(SYSTEM_PROMPT)])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)(ids).logits
    adapted = PeftModel.from_pretrained(load_base(checkpoint), folder).eval()(ids).logits
    assert (merged - adapted).norm() / adapted.norm() < 0.05


def test_nothing_is_written_over(asked, tmp_path):
    mine = tmp_path / "her.gguf", tmp_path / export.MODELFILE, tmp_path / "whole"
    for path in mine:
        path.write_text("mine")
        flag = "--merged" if path.name == "whole" else "--gguf"
        with pytest.raises(SystemExit, match=f"{path.name} exists already. Delete it"):
            asked(flag, path if flag == "--merged" else tmp_path / "her.gguf")
        assert path.read_text() == "mine" and not list(tmp_path.glob("*.part"))
        path.unlink()


def test_half_a_merged_folder_does_not_stay(asked, tmp_path, monkeypatch):
    def full(tokenizer, folder, **_):
        assert (folder / "model.safetensors").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(SystemExit, match="No space left"):
        asked("--merged", tmp_path / "whole")
    assert not list(tmp_path.glob("whole*"))


def test_one_kind_of_file_is_asked_for(asked, tmp_path, capsys):
    for arguments in ([], ["--gguf", tmp_path / "her.gguf", "--merged", tmp_path / "whole"]):
        with pytest.raises(SystemExit):
            asked(*arguments)
        assert re.search(r"one of the arguments --gguf --merged is required|not allowed with", capsys.readouterr().err)
    with pytest.raises(SystemExit, match=r"does not end in \.gguf"):
        asked("--gguf", tmp_path / "her.bin")


def test_a_base_that_is_stated_as_a_path_is_told_by_the_dimensions(tmp_path):
    shapes = _expected_shapes(1, SMALL.dimensions, dora=False)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(LAYERS)}
    (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/models/qwen"}))
    assert export.base_of(tmp_path) == "small"


def test_a_folder_of_which_no_base_is_known_is_refused(asked, trained, tmp_path):
    with pytest.raises(SystemExit, match=r"trained on tiny, a base of your own. Give its folder with --base"):
        asked("--gguf", tmp_path / "her.gguf", base=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"{CONFIG} is missing"):
        asked("--gguf", tmp_path / "her.gguf", folder=tmp_path / "empty", base=None)
    broken = shutil.copytree(trained.folder, tmp_path / "broken")
    for text, message in (("{", "is not JSON"), ("{}", "peft_type None is not a LoRA")):
        (broken / CONFIG).write_text(text)
        with pytest.raises(SystemExit, match=message):
            asked("--gguf", tmp_path / "her.gguf", folder=broken, base=None)
