#!/usr/bin/env bash
# Checks and measures flowrun on a machine with a GPU and without a network:
#
#   ./check.sh [--short] [--only STEP...] [--list] [DEVICE]
#
# Needs Python with torch 2.11.0 (PYTHON=... names another one than python3) for its libtorch. What is written goes
# to $OUT, `figures` here unless it is set. check.py says more.
set -euo pipefail

OUT=$(realpath -m "${OUT:-figures}")
export OUT
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-$(command -v python3)} || { echo "there is no python3; PYTHON=... names one" >&2; exit 1; }
exec "$python" check.py "$@"
