#!/usr/bin/env python3
"""Time from starting `folovllm serve` to the first token of an answer, with the model already pulled.

    python scripts/dev/bench_serve_start.py [--repeats 5] [--model smollm2-135m] [--json OUT] [-- OPTIONS OF SERVE]

The clock starts before the process does. The client tries to connect every 10 ms and then streams a completion.
"""

import argparse
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.report import write_json

LONGEST = 120.0  # seconds; a server that takes longer has failed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def one_start(model: str, options: list[str]) -> tuple[float, float]:
    """Seconds until the server takes a connection, and until the first token."""
    port = free_port()
    command = [sys.executable, "-m", "folovllm", "serve", model, "--port", str(port), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.perf_counter() - start > LONGEST:
                    raise RuntimeError(f"the server did not start: {process.communicate()[1]}") from None
                time.sleep(0.01)
        ready = time.perf_counter() - start
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST)
        body = {"prompt": "The capital of France is", "max_tokens": 1, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert connection.getresponse().readline().startswith(b"data: ")
        return ready, time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LONGEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write machine and results there")
    parser.add_argument("options", nargs="*", help="options of folovllm serve")
    args = parser.parse_args()
    header = machine_header()  # first: the load average should not be ours
    one_start(args.model, args.options)  # fills the file cache; the first start of a day is slower
    ready, token = zip(*(one_start(args.model, args.options) for _ in range(args.repeats)), strict=True)
    row = {"repeats": args.repeats, "ready_s": statistics.median(ready), "first_token_s": statistics.median(token)}
    row["slowest_first_token_s"] = max(token)
    print("process start to readiness {ready_s:.2f} s, to the first token {first_token_s:.2f} s".format(**row), end=" ")
    print("(medians; slowest {slowest_first_token_s:.2f} s)".format(**row))
    if args.json is not None:
        command = f"scripts/dev/bench_serve_start.py --repeats {args.repeats}"
        write_json({"machine": header, "command": command, "unit": "s", "results": [row]}, args.json)


if __name__ == "__main__":
    main()
