"""`folovllm demo` (`make demo`): answers real prompts together, then asks HuggingFace for the same tokens.

Milestone: M1. vLLM counterpart: none. Everything shown is measured in this run. The exit code is 1 if a token differs
where HuggingFace itself was sure (R1.40).

`demo_results.py` holds what was found, `demo_board.py` draws it, and this file runs both engines.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from folovllm.entrypoints.commands.demo_results import Answers, Verdict, first_difference
from folovllm.entrypoints.commands.options import DebugOption, EngineOptions, with_options

if TYPE_CHECKING:
    from folovllm.config import EngineConfig
    from folovllm.entrypoints.commands.demo_board import Board
    from folovllm.entrypoints.commands.hf_baseline import HfGreedy
    from folovllm.entrypoints.llm import LLM

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write one sentence about a cat.",
    "Name three primary colors.",
    "What is photosynthesis?",
)
MAX_MODEL_LEN = 512  # enough here; a cache for the model's own 8,192 tokens would waste memory


@with_options
def demo(
    engine: EngineOptions,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    debug: DebugOption = False,
) -> None:
    """Answer real prompts, then check every token against HuggingFace's and compare the speed.

    Greedy and in float32 on both sides, so the tokens must be equal; exit code 1 if they are not.

    \b
      folovllm demo
      folovllm demo --preset m1 --max-tokens 32
    """
    llm, model_dir = _load(engine)
    from folovllm.entrypoints.commands.demo_board import make_board

    prompts = [_prompt(llm, text) for text in PROMPTS]
    kv_cache_config = llm.llm_engine.engine_core.kv_cache_config
    board = make_board(PROMPTS, kv_cache_config.bytes_per_block // kv_cache_config.block_size)
    board.say(_heading(llm.config))
    answers = answer(llm, prompts, max_tokens, board)
    board.say("HuggingFace: the same token ids, one prompt after another (loading transformers takes a few seconds)")
    theirs, verdicts = compare(model_dir, answers, max_tokens, llm.config.device, board)
    board.report(answers, theirs, verdicts, kv_cache_config)
    if any(verdict.is_wrong for verdict in verdicts):
        raise typer.Exit(1)


def _load(engine: EngineOptions) -> "tuple[LLM, Path]":
    """Returns the engine in float32, with a cache for all prompts at once, and the model's folder for HuggingFace."""
    from folovllm.config import DEFAULT_MODEL, DTYPE_BYTES, EngineConfig
    from folovllm.hf_config import load_hf_config
    from folovllm.hub import find_model

    args = engine.engine_args(model=DEFAULT_MODEL, dtype="float32")
    if args["dtype"] != "float32":
        raise ValueError("the demo compares tokens in float32, where they must be equal: leave --dtype out")
    EngineConfig.from_args(preset=engine.preset, without=engine.without or (), **args)
    folder = find_model(args["model"], args.get("download_dir"), pull=True)
    arch = load_hf_config(folder)
    max_model_len = args.get("max_model_len") or min(MAX_MODEL_LEN, arch.max_context_len)
    page = arch.kv_bytes_per_token(DTYPE_BYTES["float32"]) * max_model_len
    cache = (
        {} if args.get("num_kv_blocks") else {"kv_cache_memory": (len(PROMPTS) + 1) * page}
    )  # + 1 for the null block
    return engine.load(dtype="float32", max_model_len=max_model_len, **cache), folder


def _prompt(llm: "LLM", text: str) -> dict[str, Any]:
    """Returns `text` as a chat message if the model has a chat template, else as it is. Token ids are included either
    way.
    """
    if llm.get_tokenizer().chat_template is None:
        return {"prompt": text, "prompt_token_ids": llm.get_tokenizer().encode(text)}
    return llm.chat_prompt([{"role": "user", "content": text}])


def _heading(config: "EngineConfig") -> str:
    together = "together" if config.max_num_seqs > 1 else "one request at a time"
    return (
        f"FoloVLLM: {len(PROMPTS)} prompts, {together}; greedy, float32 on {config.device}, "
        f"{config.attention_config.attention_backend} attention, blocks of {config.block_size} tokens"
    )


def answer(llm: "LLM", prompts: list[dict[str, Any]], max_tokens: int, board: "Board") -> Answers:
    """Runs all prompts through the engine and updates `board` after every step."""
    from folovllm.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    llm.generate(prompts[0], params.replace(max_tokens=min(2, max_tokens)), use_tqdm=False)  # warm-up, as HuggingFace's
    engine, outputs, used, reserved = llm.llm_engine, {}, 0, 0
    with board:
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add_request(f"demo-{index}", prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                outputs[int(output.request_id.removeprefix("demo-"))] = output
            stats = engine.stats()
            used, reserved = max(used, stats.num_used_slots), max(reserved, stats.num_reserved_slots)
            board.step(outputs, time.perf_counter() - start, stats)
        seconds = time.perf_counter() - start
    token_ids = [outputs[index].outputs[0].token_ids for index in range(len(prompts))]
    return Answers([prompt["prompt_token_ids"] for prompt in prompts], token_ids, seconds, used, reserved)


def compare(
    model_dir: Path, answers: Answers, max_tokens: int, device: str, board: "Board"
) -> "tuple[HfGreedy, list[Verdict]]":
    """Returns HuggingFace's answers to the same token ids, and a verdict on each of our answers."""
    from folovllm.entrypoints.commands.hf_baseline import hf_greedy, hf_top_two_gap

    limits = [max_tokens] * len(answers.prompt_token_ids)
    theirs = hf_greedy(model_dir, answers.prompt_token_ids, limits, device=device, on_done=board.baseline_done)
    verdicts = []
    for prompt, mine, other in zip(answers.prompt_token_ids, answers.token_ids, theirs.token_ids, strict=True):
        index = first_difference(mine, other)
        gap = 0.0 if index is None else hf_top_two_gap(model_dir, prompt + other[:index], device=device)
        verdicts.append(Verdict(index, gap))
    return theirs, verdicts
