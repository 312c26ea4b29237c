"""start_block: what `folovllm serve` prints when it is ready.

Milestone: M8. vLLM counterpart: none; its log lists the routes.
"""

import socket

from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.state import ServerState


def start_block(state: ServerState, listener: socket.socket) -> str:
    """What a user wants to know first: where, what, how much room, and a line to try."""
    config, options, name = state.engine.config, state.options, state.model_names[0]
    room = state.engine.kv_cache_config.num_usable_blocks * config.block_size
    url, curl = _url(options, listener)
    rows = [
        ("model", f"{', '.join(state.model_names)}, {config.model_config.dtype} on {config.device}"),
        ("KV cache", f"{room:,} tokens: {room // config.max_model_len} requests of {config.max_model_len:,} tokens"),
        ("requests", f"{config.max_num_seqs} run at once, {options.max_queue} more may wait"),
        (
            "API key",
            "needed" if options.api_key else "none: every client that reaches this address is served (--api-key)",
        ),
    ]
    lines = [f"FoloVLLM serves at {url}", "", *(f"  {label:<10}{text}" for label, text in rows), ""]
    key = " -H 'Authorization: Bearer KEY'" if options.api_key else ""
    has_chat = state.chat_template or (state.engine.tokenizer and state.engine.tokenizer.chat_template)
    path, body = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Hello"}]')
        if has_chat
        else ("completions", '"prompt": "The capital of France is"')
    )
    return "\n".join(
        [
            *lines,
            f"  {curl}/v1/{path}{key} \\",
            "    -H 'Content-Type: application/json' \\",
            f'    -d \'{{"model": "{name}", {body}}}\'',
            "",
            "Ctrl-C ends it.",
        ]
    )


def _url(options: ServerOptions, listener: socket.socket) -> tuple[str, str]:
    """The address, and how a curl command begins that uses it."""
    if options.uds is not None:
        return f"unix:{options.uds}", f"curl --unix-socket {options.uds} http://localhost"
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return url, f"curl {url}"
