"""start_block: what `folovllm serve` prints when it is ready.

Milestone: M8. vLLM counterpart: none; its log lists the routes.
"""

import socket

from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.state import ServerState

EVERY_NETWORK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # an address to listen on -> one to ask
COMPLETION = ("completions", '"prompt": "The capital of France is"')
CHAT = ("chat/completions", '"messages": [{"role": "user", "content": "Hello"}]')


def start_block(state: ServerState, listener: socket.socket) -> str:
    """What a user wants to know first: where, what, how much room, and a line to try."""
    config, options = state.engine.config, state.options
    room = state.engine.kv_cache_config.num_usable_blocks * config.block_size
    url, curl = _url(options, listener)
    num_engines = state.engine.num_engines
    where = ", on every network of this machine" if options.host in EVERY_NETWORK and options.uds is None else ""
    rows = {
        "model": f"{', '.join(state.model_names)}, {config.model_config.dtype} on {config.device}",
        "KV cache": f"{room:,} tokens: {room // config.max_model_len} requests of {config.max_model_len:,} tokens",
        "requests": f"{config.max_num_seqs * num_engines} run at once, {options.max_queue} more may wait",
        "API key": "needed" if options.api_key else "none, so every client that reaches this address is served",
    }
    if config.parallel_config.world_size > 1:
        rows["ranks"] = config.parallel_config.describe_ranks(config.device)
    if num_engines > 1:
        rows["engines"] = (
            f"{num_engines}, each with all weights and a KV cache as above; requests go where their prefix is"
        )
    if options.uds is None:
        rows["page"] = f"{url}/ to chat and to watch the engine"
    facts = [f"  {label:<10}{text}" for label, text in rows.items()]
    return "\n".join([f"FoloVLLM serves at {url}{where}", "", *facts, "", *_try(state, curl), "", "Ctrl-C ends it."])


def _try(state: ServerState, curl: str) -> list[str]:
    """A command to copy: a chat if there is a chat template."""
    has_template = state.chat_template or (state.engine.tokenizer and state.engine.tokenizer.chat_template)
    path, body = CHAT if has_template else COMPLETION
    key = " -H 'Authorization: Bearer KEY'" if state.options.api_key else ""
    return [
        f"  {curl}/v1/{path}{key} \\",
        "    -H 'Content-Type: application/json' \\",
        f'    -d \'{{"model": "{state.model_names[0]}", {body}}}\'',
    ]


def _url(options: ServerOptions, listener: socket.socket) -> tuple[str, str]:
    """The address, and how a curl command begins that uses it."""
    if options.uds is not None:
        return f"unix:{options.uds}", f"curl --unix-socket {options.uds} http://localhost"
    host, port = listener.getsockname()[:2]
    host = EVERY_NETWORK.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return url, f"curl {url}"
