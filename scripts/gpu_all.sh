#!/usr/bin/env bash
# Measures on an NVIDIA GPU all that FoloVLLM has not measured yet: docs/dev/gpu_status.md says what, and how long it takes.
#
#     bash scripts/gpu_all.sh [--device cuda|cpu] [--out DIR] [--minutes 8] [--parts machine,tests,...]
#
# It needs torch, Triton, transformers and pytest, from .venv of `make setup` or else from python3. folovllm need not be
# installed: the script runs this checkout.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" "$root/scripts/dev/gpu_all.py" "$@"
