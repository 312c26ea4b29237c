"""What `folovllm demo` shows while it runs and at the end: redrawn in a terminal, plain lines elsewhere.

Milestone: M1. vLLM counterpart: none. No other file of the demo imports rich.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.entrypoints.commands.demo_results import Answers, Verdict
from folovllm.outputs import EngineStats, RequestOutput

if TYPE_CHECKING:
    from folovllm.entrypoints.commands.hf_baseline import HfGreedy

REDRAW_SECONDS = 0.1  # drawing takes processor time from the engine


class Board:
    """Plain output: a line or two whenever a prompt has finished. `LiveBoard` redraws instead."""

    def __init__(self, prompts: Sequence[str], kv_bytes_per_token: int, console: Console) -> None:
        self.prompts = prompts
        self.kv_bytes_per_token = kv_bytes_per_token
        self.console = console
        self._shown: set[int] = set()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="bold"), soft_wrap=True)

    def step(self, outputs: Mapping[int, RequestOutput], seconds: float, stats: EngineStats) -> None:
        """Called after each step of the engine. `outputs` is the newest output of each prompt that has one."""
        for index, output in outputs.items():
            if output.finished and index not in self._shown:
                self._shown.add(index)
                self.console.print(_dialogue(index, self.prompts[index], output), soft_wrap=True)

    def baseline_done(self, index: int) -> None:
        self.console.print(Text(f"  {index + 1}/{len(self.prompts)} done", style="dim"))

    def report(
        self, answers: Answers, theirs: "HfGreedy", verdicts: list[Verdict], kv_cache_config: KVCacheConfig
    ) -> None:
        """Prints the tables at the end."""
        self.console.print(_verdict_table(self.prompts, answers, verdicts))
        self.console.print(_speed_table(answers, theirs))
        self.console.print(_kv_text(answers, kv_cache_config), soft_wrap=True)
        equal = sum(verdict.first_difference is None for verdict in verdicts)
        wrong = sum(verdict.is_wrong for verdict in verdicts)
        ties = (
            f"; {len(verdicts) - equal - wrong} at a tie, where either token is right"
            if equal + wrong < len(verdicts)
            else ""
        )
        style = "bold red" if wrong else "bold green"
        self.console.print(Text(f"equal to HuggingFace: {equal} of {len(verdicts)} prompts{ties}", style=style))


class LiveBoard(Board):
    """All answers grow side by side, redrawn at most ten times a second."""

    def __init__(self, prompts: Sequence[str], kv_bytes_per_token: int, console: Console) -> None:
        super().__init__(prompts, kv_bytes_per_token, console)
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
        self._next_draw = 0.0

    def __enter__(self) -> "Board":
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def step(self, outputs: Mapping[int, RequestOutput], seconds: float, stats: EngineStats) -> None:
        all_done = len(outputs) == len(self.prompts) and all(output.finished for output in outputs.values())
        if seconds >= self._next_draw or all_done:
            self._next_draw = seconds + REDRAW_SECONDS
            self._live.update(self._picture(outputs, seconds, stats), refresh=True)

    def _picture(self, outputs: Mapping[int, RequestOutput], seconds: float, stats: EngineStats) -> Group:
        used = stats.num_used_slots * self.kv_bytes_per_token
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs.values())
        status = (
            f"{num_tokens} tokens, {num_tokens / max(seconds, 1e-9):.1f} tok/s, {stats.num_running} running, "
            f"{stats.num_waiting} waiting, K/V of {stats.num_used_slots} tokens cached = {used:,} bytes"
        )
        texts = [_dialogue(index, prompt, outputs.get(index)) for index, prompt in enumerate(self.prompts)]
        return Group(*texts, Text(status, style="cyan"))


def make_board(prompts: Sequence[str], kv_bytes_per_token: int) -> Board:
    """Returns a LiveBoard in a terminal, a Board in a pipe or in CI."""
    console = Console(highlight=False)
    return (LiveBoard if console.is_terminal else Board)(prompts, kv_bytes_per_token, console)


def _dialogue(index: int, prompt: str, output: RequestOutput | None) -> Text:
    """Returns one prompt, its answer so far, and the number of tokens of the answer."""
    text = Text(f"[{index + 1}] {prompt}\n", style="bold")
    if output is None:
        return text.append("    waiting\n", style="dim not bold")
    completion = output.outputs[0]
    text.append("    " + completion.text.strip().replace("\n", "\n    "), style="not bold")
    return text.append(f"  ({len(completion.token_ids)} tokens)\n", style="dim not bold")


def _verdict_table(prompts: Sequence[str], answers: Answers, verdicts: list[Verdict]) -> Table:
    table = Table("prompt", "tokens", "tokens equal to HuggingFace's")
    for prompt, tokens, verdict in zip(prompts, answers.token_ids, verdicts, strict=True):
        style = "red" if verdict.is_wrong else "green"
        table.add_row(Text(prompt), str(len(tokens)), Text(str(verdict), style=style))
    return table


def _speed_table(answers: Answers, theirs: "HfGreedy") -> Table:
    """Returns a table of both speeds, measured in this run. Prefill is included; loading and warm-up are not."""
    table = Table("engine", "tokens", "seconds", "tok/s")
    ours, others = sum(map(len, answers.token_ids)), sum(map(len, theirs.token_ids))
    for name, tokens, seconds in (
        ("FoloVLLM", ours, answers.seconds),
        ("HuggingFace, one by one", others, sum(theirs.seconds)),
    ):
        table.add_row(name, str(tokens), f"{seconds:.2f}", f"{tokens / max(seconds, 1e-9):.1f}")
    return table


def _kv_text(answers: Answers, kv: KVCacheConfig) -> Text:
    """E.g. 5 requests of 70 tokens in blocks of 512: 350 slots used, 2,560 reserved."""
    per_token = kv.bytes_per_block // kv.block_size
    return Text(
        f"KV cache: at most {answers.peak_used_slots * per_token:,} bytes used "
        f"({answers.peak_used_slots} tokens x {per_token:,} bytes), at most "
        f"{answers.peak_reserved_slots * per_token:,} bytes reserved in blocks, of {kv.usable_bytes:,} bytes allocated "
        f"(+ {kv.null_block_bytes:,} for the null block)"
    )
