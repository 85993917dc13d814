#!/usr/bin/env bash
# How much of the shorter stage is hidden behind the longer one: a flow with a sampler on cpu:0 and a
# judge on cpu:1, then each of the two alone. Alone, a stage has the same plan and so the same threads:
# what the other one made lies in its journal.
#   scripts/overlap.sh [PROMPTS]
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
flowrun="${FLOWRUN:-${CARGO_TARGET_DIR:-$here/target}/debug/flowrun}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
flow=("$here/flows/quickstart.toml" --set "rounds=1" --set "deterministic=true" --set "stages.prompts.take=${1:-48}"
    --set 'stages.prompts.shard={count=1}' --set 'stages.halves.outputs={train=0.75,validation=0.25}'
    --set "stages.align.in_rounds=[9]" --output "$work/run")
stage_seconds() { # the time from the first to the last sign of the two stages
    python3 - "$work/run/summary.json" "$1" <<'P'
import json, sys
stages = json.load(open(sys.argv[1]))["rounds"][0]["stages"]
print(max(stages[name]["seconds_wall"] for name in sys.argv[2].split(",")))
P
}
run() { "$flowrun" "${flow[@]}" "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }
run
both="$(stage_seconds sample,judge)"
rm -rf "$work/run/round-1/judge"; run
judge="$(stage_seconds judge)"
rm -rf "$work/run/round-1/sample"; run
sampler="$(stage_seconds sample)"
awk -v b="$both" -v s="$sampler" -v j="$judge" 'BEGIN {
    long = s > j ? s : j
    printf "together %.1f s, sampler alone %.1f s, judge alone %.1f s\n", b, s, j
    printf "to the longer: %.2f, to the sum: %.2f\n", b / long, b / (s + j)
}'
