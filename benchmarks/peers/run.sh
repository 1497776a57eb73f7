#!/usr/bin/env bash
# Measure the peers on this machine's GPU. Each gets an environment of its own in .venv-peers, some 6 GB apiece.
#   benchmarks/peers/run.sh train          stock Trainer, Liger, TRL, Unsloth: one table
#   benchmarks/peers/run.sh serve          vLLM: one table
#   benchmarks/peers/run.sh make NAME...   only the environments: stock, liger, trl, unsloth, vllm
# PYTHON names the interpreter they are made with, 3.12 where it is there. Our own rows: make setup, then
# .venv/bin/python -m benchmarks.train --random --whole, and -m benchmarks.decode --random --tokens 128.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$(command -v python3.12 || command -v python3)}

make_environment() {
    local folder=.venv-peers/$1 pins=benchmarks/peers/requirements-$1.txt
    [ -f "$pins" ] || { echo "There is no peer $1. Choose: stock, liger, trl, unsloth, vllm." >&2; exit 2; }
    if [ -f "$folder/stamp" ] && [ ! "$pins" -nt "$folder/stamp" ]; then return; fi
    "$PYTHON" -m venv "$folder"
    "$folder/bin/python" -m pip install --disable-pip-version-check -r "$pins"
    touch "$folder/stamp"
}

ours() {  # the rows of the recipe come from this project's own code
    [ -x .venv/bin/python ] || { echo "Run make setup first." >&2; exit 2; }
    exec .venv/bin/python -m "$@"
}

what=${1:-}
[ $# -gt 0 ] && shift
case $what in
    make) for name in "$@"; do make_environment "$name"; done ;;
    train)
        for name in stock liger trl unsloth; do make_environment "$name"; done
        ours benchmarks.peers.train_peers "$@" ;;
    serve)
        make_environment vllm
        ours benchmarks.peers.serve_vllm "$@" ;;
    *) sed -n '2,7p' "$0"; exit 2 ;;
esac
