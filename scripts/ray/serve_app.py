#!/usr/bin/env python3
"""Example: the server on Ray Serve, and a load that makes it grow to two replicas. `pip install 'folovllm[ray]'`

Milestone: M10. It runs on a laptop with 2 CPUs: python scripts/ray/serve_app.py --model smollm2-135m
"""

import argparse
import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from folovllm.distributed.ray_cluster import join_cluster
from folovllm.entrypoints.ray_serve import build_app


def ask(port: int, prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 24, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text


def num_replicas() -> int:
    """How many replicas are running."""
    from ray import serve

    application = serve.status().applications["default"]
    states: dict[str, int] = application.deployments["folovllm"].replica_states
    return states.get("RUNNING", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a folder or an id (default: smollm2-135m)")
    parser.add_argument("--port", type=int, default=8123, help="to listen on, on this machine only (default: 8123)")
    args = parser.parse_args()
    join_cluster(None, num_cpus=4)
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    options: dict[str, Any] = {"model": args.model, "max_model_len": 256, "max_replicas": 2}
    serve.run(build_app(options | {"target_ongoing_requests": 2, "cpu_threads": 1}))
    print(f"one request, {num_replicas()} replica: {ask(args.port, 'The capital of France is')!r}")
    deadline = time.monotonic() + 90
    with ThreadPoolExecutor(12) as pool:
        count = 0
        while num_replicas() < 2 and time.monotonic() < deadline:
            count += len(list(pool.map(lambda i: ask(args.port, f"{i}. Once upon a time"), range(12))))
    print(f"{count} requests from 12 clients later: {num_replicas()} replicas")
    serve.shutdown()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # names what a user can mend, such as a missing package
        sys.exit(f"error: {error}")
