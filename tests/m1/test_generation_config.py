"""End of text and sampling defaults: the tokenizer's EOS, generation_config.json's ids, and its sampling values.

Public reports: mlx-vlm pull 2112, open-r1 pull 663, vllm pull 4182 (only the tokenizer names the right EOS); vllm pull
5849 and vllm issue 4589 (min_tokens must forbid every stop id, under ignore_eos, too); vllm pull 11164, mlx-vlm issue
1331, TensorRT-LLM issue 9656 (sampling defaults of generation_config.json).
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.generation_config import default_sampling_params
from folovllm.hf_config import ConfigError, load_hf_config, parse_hf_config
from tests.tiny_models import EOS

pytestmark = pytest.mark.m1

LIMITS = {"dtype": "float32", "max_model_len": 64}
PROMPT = [5, 6, 7]


@pytest.fixture
def folder(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that the test may change; its tokenizer's EOS is EOS."""
    return shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    values = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def set_eos(folder: Path, config: Any, generation: Any = "no file") -> None:
    edit(folder / "config.json", eos_token_id=config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation != "no file":
        edit(folder / "generation_config.json", eos_token_id=generation)


def run(llm: LLM, wanted: int, **params: Any) -> Any:
    """A request that would answer `wanted` at once and forever."""
    params = {"temperature": 0.0, "max_tokens": 6, "logit_bias": {wanted: 100.0}} | params
    return llm.generate([PROMPT], SamplingParams(**params), use_tqdm=False)[0].outputs[0]


# --- End of text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config,generation",
    [(9, 9), (None, None), (None, "no file"), ("absent", "no file"), ([], []), ([9, 8], None), (9, [8]), (-1, -1)],
)
def test_the_tokenizers_eos_ends_a_request_whatever_the_configs_say(config: Any, generation: Any, folder: Path) -> None:
    set_eos(folder, config, generation)
    completion = run(LLM(str(folder), **LIMITS), EOS)
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == ([EOS], "stop", None)


@pytest.mark.parametrize(
    "config,generation",
    [(9, "no file"), ([EOS, 9], "no file"), (EOS, 9), (EOS, [EOS, 9]), (None, [9]), ([9], None), (9, 9)],
)
def test_every_other_eos_of_the_configs_is_a_stop_id(config: Any, generation: Any, folder: Path) -> None:
    set_eos(folder, config, generation)
    llm = LLM(str(folder), **LIMITS)
    completion = run(llm, 9)
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == ([9], "stop", 9)
    assert run(llm, 9, ignore_eos=True).token_ids == [9] * 6


def test_an_eos_in_the_text_config_counts() -> None:
    config = json.loads((Path(__file__).parent.parent / "data/configs/Qwen3-0.6B.json").read_text())
    nested = config | {"eos_token_id": None, "text_config": {"eos_token_id": [7, 8]}}
    assert parse_hf_config(nested).eos_token_ids == (7, 8)
    assert parse_hf_config(nested | {"text_config": {}}).eos_token_ids == ()


@pytest.mark.parametrize("value", ["</s>", 2.0, [2, "3"], [[2]], True, {"id": 2}])
def test_an_eos_that_is_no_token_id_is_refused_naming_the_file(value: Any, folder: Path) -> None:
    set_eos(folder, 2, value)
    with pytest.raises(ConfigError, match=r"'eos_token_id' in generation_config.json; found .*to fix it: correct gene"):
        load_hf_config(folder)
    set_eos(folder, value)
    with pytest.raises(ConfigError, match=r"'eos_token_id' in config.json"):
        load_hf_config(folder)


def test_an_eos_beyond_the_vocabulary_is_never_sampled_and_harms_nothing(folder: Path) -> None:
    set_eos(folder, 264, [EOS, 100_000])
    completion = run(LLM(str(folder), **LIMITS), 9, min_tokens=3)
    assert completion.token_ids == [9] * 6


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("wanted,params", [(EOS, {}), (9, {}), (8, {}), (11, {"stop_token_ids": [11]})])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_every_stop_id(
    ignore_eos: bool, wanted: int, params: dict[str, Any], temperature: float, folder: Path
) -> None:
    """The ids of the tokenizer, of both configs and of the request, greedy and sampled, alone and as one of n."""
    set_eos(folder, 8, [EOS, 9])
    llm = LLM(str(folder), **LIMITS)
    params |= {"min_tokens": 3, "ignore_eos": ignore_eos, "temperature": temperature, "seed": 1}
    answers = [run(llm, wanted, **params).token_ids]
    if temperature:
        many = SamplingParams(n=2, max_tokens=6, logit_bias={wanted: 100.0}, **params)
        answers += [c.token_ids for c in llm.generate([PROMPT], many, use_tqdm=False)[0].outputs]
    for token_ids in answers:
        assert wanted not in token_ids[:3] and token_ids[3] == wanted


def test_a_preempted_request_keeps_its_stop_ids(folder: Path) -> None:
    """What the worker knows of a request survives: two requests in a cache that holds one and a half of them."""
    set_eos(folder, EOS, [EOS, 9])
    limits = LIMITS | {"max_model_len": 40, "block_size": 4, "num_kv_blocks": 13}
    llm = LLM(str(folder), enable_prefix_caching=False, **limits)
    params = SamplingParams(temperature=0.0, max_tokens=30, min_tokens=25, ignore_eos=True, logit_bias={9: 100.0})
    outputs = llm.generate([PROMPT, PROMPT], params, use_tqdm=False)
    assert llm.stats().num_preemptions > 0
    for output in outputs:
        assert 9 not in output.outputs[0].token_ids[:25] and output.outputs[0].token_ids[25:] == [9] * 5


# --- Sampling defaults ------------------------------------------------------------------------------------------------


def set_defaults(folder: Path, **values: Any) -> None:
    edit(folder / "generation_config.json", **values)


def test_the_keys_that_vllm_takes(folder: Path) -> None:
    values = {"repetition_penalty": 1.1, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05}
    set_defaults(folder, do_sample=False, num_beams=4, no_repeat_ngram_size=3, max_new_tokens=7, **values)
    params = LLM(str(folder), **LIMITS).get_default_sampling_params()
    assert params == SamplingParams(max_tokens=7, **values)


@pytest.mark.parametrize("values", [{}, {"temperature": None, "top_k": None}, {"do_sample": True}])
def test_a_file_without_them_changes_nothing(values: dict[str, Any], folder: Path) -> None:
    set_defaults(folder, **values)
    assert LLM(str(folder), **LIMITS).get_default_sampling_params() == SamplingParams()


def test_they_hold_where_no_parameters_are_given_and_only_there(folder: Path) -> None:
    set_defaults(folder, temperature=0.7, top_k=1, repetition_penalty=1.3, max_new_tokens=9)
    llm = LLM(str(folder), **LIMITS)
    explicit = SamplingParams(temperature=0.7, top_k=1, repetition_penalty=1.3, max_tokens=9)
    wanted = llm.generate([PROMPT], explicit, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.generate([PROMPT], use_tqdm=False)[0].outputs[0].token_ids == wanted
    assert [i for output in llm.stream(PROMPT) for i in output.outputs[0].token_ids] == wanted
    message = [{"role": "user", "content": "hello"}]
    assert llm.chat(message, use_tqdm=False)[0].outputs[0].token_ids == (
        llm.chat(message, explicit, use_tqdm=False)[0].outputs[0].token_ids
    )
    assert len(llm.generate([PROMPT], SamplingParams(ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids) == 16


def test_they_are_announced_once_and_only_when_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_defaults(folder, temperature=0.7, top_k=1)
    llm = LLM(str(folder), **LIMITS)
    with caplog.at_level(logging.INFO):
        llm.generate([PROMPT], SamplingParams(max_tokens=1), use_tqdm=False)
        assert "generation_config.json" not in caplog.text
        for _ in range(3):
            llm.generate([PROMPT], use_tqdm=False)
    told = [record.getMessage() for record in caplog.records if "generation_config.json" in record.getMessage()]
    assert len(told) == 1 and "{'temperature': 0.7, 'top_k': 1}" in told[0]


def test_where_they_come_from_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    set_defaults(folder, temperature=0.7, eos_token_id=9)
    other = tmp_path / "other"
    other.mkdir()
    edit(other / "generation_config.json", temperature=0.3, eos_token_id=8)
    by_source = {
        source: LLM(str(folder), generation_config=source, **LIMITS) for source in ("auto", "vllm", str(other))
    }
    temperatures = {source: llm.get_default_sampling_params().temperature for source, llm in by_source.items()}
    assert temperatures == {"auto": 0.7, "vllm": 1.0, str(other): 0.3}
    # The ids that end a text are no sampling defaults: "vllm" keeps the model's.
    stops = {source: llm.config.model_config.arch.eos_token_ids for source, llm in by_source.items()}
    assert stops == {"auto": (EOS, 9), "vllm": (EOS, 9), str(other): (EOS, 8)}
    with pytest.raises(ValueError, match=r"expected generation_config to be 'auto', 'vllm' or a folder.*nowhere"):
        LLM(str(folder), generation_config=str(tmp_path / "nowhere"), **LIMITS)


@pytest.mark.parametrize("source,expected", [("auto", (0.5, 3)), ("vllm", (0.5, 0))])
def test_single_values_can_be_overridden(source: str, expected: tuple[float, int], folder: Path) -> None:
    set_defaults(folder, temperature=0.7, top_k=3)
    override = {"temperature": 0.5}
    llm = LLM(str(folder), generation_config=source, override_generation_config=override, **LIMITS)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k) == expected


@pytest.mark.parametrize(
    "values,message",
    [
        ({"temperature": -1.0}, r"temperature must be in \[0, inf\), got -1.0"),
        ({"temperature": "0.7"}, "temperature must be a finite number, got '0.7'; write 0.7"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": 20.0}, "top_k must be an integer, got 20.0; write 20"),
        ({"min_p": 2}, r"min_p must be in \[0, 1\], got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_refused_naming_the_file(values: dict[str, Any], message: str, folder: Path) -> None:
    set_defaults(folder, **values)
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(str(folder), **LIMITS)
    assert str(folder / "generation_config.json") in str(caught.value)
    assert "to fix it: correct the file, or pass generation_config='vllm'" in str(caught.value)
    assert default_sampling_params(folder, "vllm") == {}


def test_a_file_that_is_no_json_object_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"a JSON object in generation_config.json"):
        LLM(str(folder), **LIMITS)


@pytest.mark.parametrize(
    "override,message",
    [
        ({"temprature": 1.0}, "unknown key of override_generation_config 'temprature'; did you mean 'temperature'"),
        ({"temperature": -1}, r"override_generation_config: temperature must be in"),
        ("hot", "override_generation_config must be a dict"),
    ],
)
def test_a_wrong_override_is_refused(override: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), override_generation_config=override, **LIMITS)
