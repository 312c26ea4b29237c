"""Bad input, in one table: what was wrong, and the sentence that says what to do about it (R1.50).

Every row raises a ValueError (or a class of ours that is one) whose message names the fix. After each, the engine that
the module shares must be idle and answer as before: a refusal leaves nothing behind.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.config import EngineConfig
from folovllm.hf_config import ConfigError
from folovllm.hub import ModelFolderError, ModelNotFoundError
from folovllm.milestones import RungNotBuiltError, rungs_above_top
from folovllm.model_executor.weight_utils import WeightsError

pytestmark = pytest.mark.m1

ENGINE = {"preset": "m3", "max_model_len": 64, "num_kv_blocks": 33}
MESSAGES = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class World:
    """What the rows work on: the shared engine, its model's folder, and a scratch folder of the row's own."""

    llm: LLM
    model: Path
    scratch: Path

    def generate(self, prompts: Any, params: Any = None, **kwargs: Any) -> Any:
        return self.llm.generate(prompts, params, use_tqdm=False, **kwargs)

    def sample(self, **params: Any) -> Any:
        return self.generate("hello", SamplingParams(**params))

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        return self.llm.chat(messages, use_tqdm=False, **kwargs)

    def load(self, **engine_args: Any) -> LLM:
        return LLM(**{"model": str(self.model)} | ENGINE | engine_args)

    def load_damaged(self, damage: Callable[[Path], Any]) -> LLM:
        copy = self.scratch / "model"
        shutil.copytree(self.model, copy)
        damage(copy)
        return self.load(model=str(copy))

    def add_twice(self) -> None:
        engine = self.llm.llm_engine
        try:
            for _ in range(2):
                engine.add_request("same", "hello", SamplingParams())
        finally:
            engine.abort_request("same")


Call = Callable[[World], Any]
Row = tuple[str, Call, type[ValueError], str]


def config(what: str, message: str, error: type[ValueError] = ValueError, **args: Any) -> Row:
    """Refused before any model is looked for."""
    return (f"config: {what}", lambda _: EngineConfig.from_args(**{"preset": "m3"} | args), error, message)


def load(what: str, message: str, error: type[ValueError] = ValueError, **args: Any) -> Row:
    """Refused once the model is known."""
    return (f"load: {what}", lambda world: world.load(**args), error, message)


def params(what: str, message: str, **values: Any) -> Row:
    return (f"params: {what}", lambda _: SamplingParams(**values), ValueError, message)


def sample(what: str, message: str, **values: Any) -> Row:
    """Good parameters that this model or engine cannot serve."""
    return (f"sample: {what}", lambda world: world.sample(**values), ValueError, message)


def prompt(what: str, message: str, prompts: Any, *args: Any, **kwargs: Any) -> Row:
    return (f"prompt: {what}", lambda world: world.generate(prompts, *args, **kwargs), ValueError, message)


def chat(what: str, message: str, messages: Any, **kwargs: Any) -> Row:
    return (f"chat: {what}", lambda world: world.chat(messages, **kwargs), ValueError, message)


def folder(what: str, message: str, damage: Callable[[Path], Any], error: type[ValueError] = ModelFolderError) -> Row:
    return (f"folder: {what}", lambda world: world.load_damaged(damage), error, message)


def without_file(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def renamed(name: str, new: str) -> Callable[[Path], Any]:
    return lambda model: (model / name).rename(model / new)


def shortened(name: str, by: int) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-by])


def with_config(**changes: Any) -> Callable[[Path], Any]:
    def edit(model: Path) -> None:
        values = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return edit


def with_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return edit


def grow(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat(2)


def write_part(world: World, source: str) -> str:
    path = world.scratch / "mine.py"
    path.write_text(source)
    return f"{path}:Mine"


CONFIG = [
    config("unknown argument", "'max_num_sequences'; did you mean 'max_num_seqs'", max_num_sequences=3),
    config("an argument of vLLM's that is not here", "unknown engine argument 'warp_factor'; known: ", warp_factor=2),
    config("number as text", "max_model_len must be an integer, got '2048'; write 2048", max_model_len="2048"),
    config("number with a point", r"max_num_seqs must be an integer, got 8\.0; write 8", max_num_seqs=8.0),
    config("True for a number", "max_num_seqs must be an integer, got True", max_num_seqs=True),
    config("1 for True", "enforce_eager must be True or False, got 1", enforce_eager=1),
    config("no requests", "max_num_seqs must be between 1 and 65536, got 0", max_num_seqs=0),
    config("negative budget", "max_num_batched_tokens must be between 1 and .*, got -1", max_num_batched_tokens=-1),
    config("absurdly many requests", r"max_num_seqs must be between 1 and 65536, got 1000000", max_num_seqs=10**6),
    config("absurd budget", "max_num_batched_tokens must be between 1 and", max_num_batched_tokens=10**30),
    config("no room for a token", "max_model_len must be at least 2, got 1", max_model_len=1),
    config("share in percent", r"gpu_memory_utilization must be in \(0, 1\], got 90", gpu_memory_utilization=90),
    config(
        "share is NaN", "gpu_memory_utilization must be a finite number, got nan", gpu_memory_utilization=float("nan")
    ),
    config("share as text", r"gpu_memory_utilization must be .* got '0.9'; write 0\.9", gpu_memory_utilization="0.9"),
    config(
        "memory with a unit", r"kv_cache_memory must be an integer, got '4GiB' \(bytes, such as", kv_cache_memory="4GiB"
    ),
    config(
        "only the null block", r"num_kv_blocks must be at least 2, got 1 \(one of them is the null", num_kv_blocks=1
    ),
    config("blocks of nothing", r"block_size must be at least 1, got 0 \(tokens, or 'max_model_len'\)", block_size=0),
    config(
        "block size as text", "block_size must be a number of tokens, such as 16, or 'max_model_len'", block_size="16"
    ),
    config("short dtype", "dtype must be one of auto, .*; got 'bf16'; did you mean 'bfloat16'", dtype="bf16"),
    config("int8", "dtype must be one of auto, float32, bfloat16, float16; got 'int8'", dtype="int8"),
    config("a GPU", "device must be one of auto, cpu, cuda; got 'gpu'; did you mean 'cuda'", device="gpu"),
    config(
        "batching",
        "batching must be one of static, continuous; got 'continous'; did you mean 'conti",
        batching="continous",
    ),
    config(
        "queue order", "scheduling_policy must be one of fcfs, priority.*; got 'prio'; did", scheduling_policy="prio"
    ),
    config(
        "linear backend",
        "linear_backend must be one of auto, onednn, torch; got 'tourch'; did you mean",
        linear_backend="tourch",
    ),
    config("fused ops", "fused_ops must be 'auto', True or False, got 'yes'", fused_ops="yes"),
    config("sampler backend", "sampler_backend must be one of auto, shortlist, torch", sampler_backend="cpp"),
    config(
        "a stack of plain linears",
        "decoder_stack=True needs linear_backend='auto': set that too, or use decoder_stack='auto'",
        preset="m4",
        decoder_stack=True,
        linear_backend="torch",
    ),
    config(
        "a stack without its parts",
        "decoder_stack=True needs fused_ops='auto', fused_mlp='auto': set that too",
        preset="m4",
        decoder_stack=True,
        fused_ops=False,
        fused_mlp=False,
    ),
    config(
        "a stack on another attention backend",
        "decoder_stack=True needs attention_backend='cpu_paged' or 'auto': set that too",
        preset="m4",
        decoder_stack=True,
        attention_backend="torch_sdpa",
    ),
    config("a fused MLP of plain linears", "fused_mlp=True needs linear_backend='auto'", fused_mlp=True, preset="m3"),
    config("seed beyond 64 bits", "seed must be between -9223372036854775808 and", seed=2**63),
    config("no model", "model must not be empty: give an alias .*, a folder or a HuggingFace id", model=""),
    config("model is no name", "model must be a str, got int", model=7),
    config("long prefills", "set enable_chunked_prefill=True or leave it 0", long_prefill_token_threshold=64),
    config("unknown preset", "unknown milestone 'M3'; .*did you mean 'm3'", preset="M3"),
    config("empty preset", "unknown milestone ''; the ladder has m0, m1", preset=""),
    config("m0", "there is no engine before m1; use preset='m1'", preset="m0"),
    config("without what?", "unknown milestone 'm33'; .*did you mean 'm3'", without=["m33"]),
    config(
        "without a rung above", "without='m3': the preset 'm2' does not include it; drop it", preset="m2", without="m3"
    ),
    config("without the ground", "m1 is the ground the others stand on; drop it from without", without=["m1"]),
    config("without None", r"without must be a list of milestones like \['m2'\], got None; use \(\)", without=None),
    config("unknown part", "unknown part 'core.schduler'; there are core.scheduler", parts={"core.schduler": "x.py:Y"}),
    config("parts as a list", r"parts must be a dict like \{'core.scheduler'", parts=["x.py:Y"]),
    config("a class as a part", r"must be a string 'path.py:Class'", parts={"core.scheduler": SamplingParams}),
    *(
        config(
            f"{rung.id} is not built",
            f"{name}={on!r} belongs to milestone {rung.id} .* not built yet; use {name}=",
            RungNotBuiltError,
            **{name: on},
        )
        for rung in rungs_above_top()
        for name, on in list(rung.on.items())[:1]
    ),
]

LOAD = [
    load(
        "longer than the model", "max_model_len=513 is more than the model's 512 .*use at most 512", max_model_len=513
    ),
    load("block longer than a request", "block_size=128 is more than max_model_len=64.*use at most 64", block_size=128),
    load("small budget", "max_num_batched_tokens=8 is less than max_model_len=64.*raise it", max_num_batched_tokens=8),
    load(
        "too few blocks", r"needs 4 blocks of 16 tokens .*but there are 4.*max_model_len to at most 48", num_kv_blocks=4
    ),
    load("unknown backend", "attention_backend.*torch_naive", attention_backend="flashy"),
    load(
        "part without its file",
        "no file nowhere.py; the path is relative to",
        parts={"core.scheduler": "nowhere.py:X"},
    ),
    load("part without a class name", "write 'path.py:Class'", parts={"core.scheduler": "mine.py"}),
    (
        "load: part without its methods",
        lambda w: w.load(parts={"core.block_pool": write_part(w, "class Mine: pass")}),
        ValueError,
        "lacks the methods get_new_blocks, .*write them, or inherit from folovllm.core.block_pool.BlockPool",
    ),
    (
        "load: part with a syntax error",
        lambda w: w.load(parts={"sample.sampler": write_part(w, "\nclass Mine(:\n")}),
        ValueError,
        r"mine\.py, line 2",
    ),
    load("typing error in an alias", "did you mean 'smollm2-135m'", ModelNotFoundError, model="smolm2-135m"),
    load(
        "path that is not there",
        "no model at .*to fix it: correct the path",
        ModelNotFoundError,
        model="./no/such/folder",
    ),
    (
        "load: a file for a folder",
        lambda w: w.load(model=str(w.model / "model.safetensors")),
        ModelFolderError,
        "pass the folder that holds it",
    ),
]

FOLDER = [
    folder("empty", "expected config.json; found an empty folder", lambda d: [p.unlink() for p in d.iterdir()]),
    folder("no config", "expected config.json; .*pass the folder of a Hugg", without_file("config.json")),
    folder("config cut short", "valid JSON.*download the file again", shortened("config.json", 20)),
    folder("no tokenizer", "expected tokenizer.json; .*copy tokenizer.json", without_file("tokenizer.json")),
    folder(
        "tokenizer cut short", "is not a tokenizer .*download it again", shortened("tokenizer.json", 50), ValueError
    ),
    folder("no weights", r"download the model's \*.safetensors files", without_file("model.safetensors")),
    folder(
        "pickles", "pickled weights are never opened.*convert them", renamed("model.safetensors", "pytorch_model.bin")
    ),
    folder("weights cut short", "cut short: fetch it again", shortened("model.safetensors", 8)),
    folder(
        "missing tensor",
        r"1 missing \(model.norm.weight\); to fix it: .*download both again",
        with_tensors(lambda t: t.pop("model.norm.weight")),
        WeightsError,
    ),
    folder(
        "unexpected tensor",
        r"1 unexpected \(model.extra.weight\); to fix it",
        with_tensors(lambda t: t.update({"model.extra.weight": t["model.norm.weight"].clone()})),
        WeightsError,
    ),
    folder(
        "wrong shape", "'model.norm.weight': .*different models: download both again", with_tensors(grow), WeightsError
    ),
    folder(
        "unsupported architecture",
        "found FalconForCausalLM; to fix it: use a model of one of these",
        with_config(architectures=["FalconForCausalLM"]),
        ConfigError,
    ),
    folder(
        "no architecture", "'architectures' in config.json.*name one of", with_config(architectures=None), ConfigError
    ),
    folder("key missing", "'hidden_size' in config.json.*download", with_config(hidden_size=None), ConfigError),
    folder("no layers", "a positive integer as 'num_hidden_layers'", with_config(num_hidden_layers=0), ConfigError),
    folder("sliding window", "set 'sliding_window': null", with_config(sliding_window=128), ConfigError),
    folder(
        "quantised", "use the unquantised model", with_config(quantization_config={"quant_method": "awq"}), ConfigError
    ),
    folder("activation", "hidden_act 'silu'; found 'gelu'", with_config(hidden_act="gelu"), ConfigError),
]

PARAMS = [
    params("temperature", r"temperature must be in \[0, inf\), got -1", temperature=-1),
    params("temperature is NaN", "temperature must be a finite number, got nan", temperature=float("nan")),
    params("temperature as text", r"temperature must be a finite number, got '0.7'; write 0\.7", temperature="0.7"),
    params("top_p", r"top_p must be in \(0, 1\], got 0", top_p=0),
    params("top_k", r"top_k must be at least -1, got -2 \(0 or -1 disable it\)", top_k=-2),
    params("min_p", r"min_p must be in \[0, 1\], got 2", min_p=2),
    params("presence_penalty", r"presence_penalty must be in \[-2, 2\], got 3", presence_penalty=3),
    params("frequency_penalty", r"frequency_penalty must be in \[-2, 2\]", frequency_penalty=-2.5),
    params("repetition_penalty", r"repetition_penalty must be in \(0, inf\), got 0", repetition_penalty=0),
    params("no tokens", r"max_tokens must be at least 1, got 0 \(None means as many as fit\)", max_tokens=0),
    params("min over max", r"min_tokens \(20\) must not exceed max_tokens \(16\)", min_tokens=20),
    params("n", "n must be at least 1, got 0", n=0),
    params("n with greedy", "n must be 1 with greedy sampling", n=2, temperature=0),
    params("seed", "seed must be between", seed=2**64),
    params("logprobs", r"logprobs must be at least -1, got -2 \(-1 means the whole vocabulary\)", logprobs=-2),
    params("empty stop string", "stop must hold non-empty strings, got ''; None means none", stop=""),
    params("stop without text", "set detokenize=True, or stop on stop_token_ids", stop="x", detokenize=False),
    params("one stop token", r"stop_token_ids must be a list, got int: 7; write \[7\]", stop_token_ids=7),
    params("one bad word", r"bad_words must be a list, got str: 'no'; write \['no'\]", bad_words="no"),
    params("nothing allowed", "allowed_token_ids must not be empty.*use None to allow all", allowed_token_ids=[]),
    params("bias as a list", r"logit_bias must be a dict like \{42: -100.0\}, got list", logit_bias=[1, 2]),
    params("bias for text", "a key of logit_bias must be an integer, got '42'; write 42", logit_bias={"42": 1.0}),
    params("bias too large", r"logit_bias\[42\] must be in \[-100, 100\], got 101", logit_bias={42: 101}),
    params("switch as text", "ignore_eos must be True or False, got 'yes'", ignore_eos="yes"),
    params("output kind", "output_kind must be one of RequestOutputKind.CUMULATIVE.*got 'delta'", output_kind="delta"),
    (
        "params: unknown key of a dict",
        lambda _: SamplingParams.from_dict({"max_new_tokens": 5}),
        ValueError,
        "unknown sampling parameter 'max_new_tokens'; did you mean 'max_tokens'",
    ),
    sample(
        "stop id", r"stop_token_ids: token id 264 is out of vocabulary \(valid ids are 0 to 263\)", stop_token_ids=[264]
    ),
    sample("allowed id", "allowed_token_ids: token id 999 is out of vocabulary", allowed_token_ids=[5, 999]),
    sample("biased id", "logit_bias: token id 300 is out of vocabulary", logit_bias={300: 1.0}),
    sample("many logprobs", "21 is greater than the maximum allowed, 20: ask for fewer, or start", logprobs=21),
    sample("all logprobs", r"-1 \(the whole vocabulary, 264\) is greater .* a larger max_logprobs", prompt_logprobs=-1),
    sample("min_tokens", r"min_tokens \(64\) exceeds the 60 tokens that fit.*lower it", min_tokens=64, max_tokens=None),
]

PROMPTS = [
    prompt("none", "prompts must be a string, token ids, a dict or a list of those, got NoneType", None),
    prompt("empty text", "prompt 0: the prompt cannot be empty: it needs at least one token", ""),
    prompt("empty ids, the second of two", "prompt 1: the prompt cannot be empty", ["hello", []]),
    prompt("bytes", "a prompt must be a string, a list of token ids, or a dict .*got bytes", b"hello"),
    prompt("a set", "prompts must be a string.*got set", {1, 2}),
    prompt("a number", "prompts must be a string.*got int", 7),
    prompt("a float among ids", r"token ids must be integers, got 2\.0 \(float\)", [[1, 2.0]]),
    prompt("True among ids", "token ids must be integers, got True", [1, True]),
    prompt("negative id", r"token id -1 is out of vocabulary \(valid ids are 0 to 263\)", [5, -1]),
    prompt("id too large", r"token id 264 is out of vocabulary \(valid ids are 0 to 263\)", [5, 264]),
    prompt("too long", "length 65.* is longer than the maximum model length of 64: shorten it", [5] * 65),
    prompt("no room to answer", r"plus the number of requested output tokens \(at least 1\).*shorten it", [5] * 64),
    prompt("misspelled key", "unknown prompt key 'promt'; did you mean 'prompt'", {"promt": "hello"}),
    prompt("empty dict", r"needs 'prompt' \(a string\) or 'prompt_token_ids' \(a list", {}),
    prompt("salt", "cache_salt must be a non-empty string, got 5", {"prompt": "hello", "cache_salt": 5}),
    prompt("params as a dict", "sampling_params must be a SamplingParams, got dict", "hello", {"temperature": 0}),
    prompt(
        "too few params", "2 sampling_params for 3 prompts: give one for all", ["a", "b", "c"], [SamplingParams()] * 2
    ),
    prompt("priority", r"priority must be an integer \(lower is served first\), got 1\.5", "hello", priority=1.5),
    (
        "prompt: id of a running request",
        lambda world: world.add_twice(),
        ValueError,
        "request id 'same' is in use: wait until that request has finished, or rename this",
    ),
    (
        "prompt: id that is no string",
        lambda world: world.llm.llm_engine.add_request(5, "hello", SamplingParams()),  # type: ignore[arg-type]
        ValueError,
        "request_id must be a non-empty string, got 5",
    ),
]

CHAT = [
    chat("none", r"non-empty list like \[\{'role': 'user'", None),
    chat("no messages", r"non-empty list like \[\{'role': 'user'", []),
    chat("text", r"non-empty list like \[\{'role': 'user'", "hello"),
    chat("one message without its list", r"non-empty list like \[\{'role': 'user'", MESSAGES[0]),
    chat("text for a message", r"messages\[1\] must be a dict with 'role' and 'content', got str", [*MESSAGES, "hi"]),
    chat("no role", r"messages\[0\] needs a 'role' that is a string, such as 'user'", [{"content": "hi"}]),
    chat("no content", r"messages\[0\] needs a 'content' that is a string, got None", [{"role": "user"}]),
    chat("an image", r"content parts must be \{'type': 'text'", [{"role": "user", "content": [{"type": "image_url"}]}]),
    chat("an object inside", "may hold only strings, numbers, lists", [{"role": "user", "content": "hi", "x": {1}}]),
    chat(
        "too long", "longer than the maximum model length of 64: shorten it", [{"role": "user", "content": "a" * 200}]
    ),
    chat("broken template", "the chat template refuses these messages: unexpected", MESSAGES, chat_template="{% if"),
    chat("template's no", "refuses these messages: no", MESSAGES, chat_template="{{ raise_exception('no') }}"),
    chat("template that breaks out", "is unsafe", MESSAGES, chat_template="{{ ''.__class__.__mro__ }}"),
    prompt("half a character", "surrogate|UTF-8", "\ud800"),
    sample("half a character", "surrogate|UTF-8", bad_words=["\ud800"]),
    chat("half a character", "surrogate|UTF-8", [{"role": "user", "content": "\ud800"}]),
    chat("template that divides by zero", "the chat template", MESSAGES, chat_template="{{ 1 / 0 }}"),
    chat("tools", "tools", MESSAGES, tools=5),
    ("stream: params", lambda w: next(w.llm.stream("hi", {"n": 1})), ValueError, "sampling_params must be"),  # type: ignore
    load("more blocks than memory", "num_kv_blocks.*memory|memory.*num_kv_blocks", num_kv_blocks=10**12),
    load("more bytes than memory", "kv_cache_memory", num_kv_blocks=None, kv_cache_memory=10**18),
]

TABLE: list[Row] = [*CONFIG, *LOAD, *FOLDER, *PARAMS, *PROMPTS, *CHAT]


# What still ends in an accident further in instead of a refusal. A row that starts to pass belongs in the table above.
@pytest.fixture(scope="module")
def llm(tiny_model_dir: Callable[[str], Path]) -> LLM:
    return LLM(str(tiny_model_dir("llama")), **ENGINE)


def answer(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    return llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def first_answer(llm: LLM) -> list[int]:
    return answer(llm)


@pytest.fixture
def world(
    llm: LLM, tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)  # relative names lead nowhere
    yield World(llm, tiny_model_dir("llama"), tmp_path)


def row_params() -> list[Any]:
    return [pytest.param(*row[1:], id=row[0]) for row in TABLE]


@pytest.mark.parametrize(("call", "error", "message"), row_params())
def test_bad_input(call: Call, error: type[ValueError], message: str, world: World, first_answer: list[int]) -> None:
    with pytest.raises(error, match=message):
        call(world)
    assert not world.llm.llm_engine.has_unfinished_requests()
    assert answer(world.llm) == first_answer


def test_the_table_is_long_enough_and_names_each_row_once() -> None:
    names = [row[0] for row in TABLE]
    assert len(names) >= 100 and len(set(names)) == len(names)
