"""The `folovllm` command, which is also `python -m folovllm`.

Milestone: M1. vLLM counterpart: none. The commands are in entrypoints/cli.py. Importing them takes a moment, and a
Ctrl-C in that moment must end the command as quietly as one that comes later.
"""

import sys

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Entry point of the console script."""
    try:
        from folovllm.entrypoints.cli import main as run
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
