"""`python -m folovllm` is the `folovllm` command."""

from folovllm.entrypoints.cli import main

if __name__ == "__main__":
    main()
