#!/usr/bin/env bash
# Everything that FoloVLLM wants to know from an NVIDIA GPU, in one run: docs/dev/gpu_status.md says what and how long.
#
#     bash scripts/gpu_all.sh [--device cuda|cpu] [--out DIR] [--minutes 8] [--parts machine,tests,...]
#
# It needs torch, Triton, transformers and pytest, but no installed folovllm: it runs this checkout.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python" # of `make install`
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" "$root/scripts/dev/gpu_all.py" "$@"
