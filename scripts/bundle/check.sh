#!/usr/bin/env bash
# Checks and measures flowrun on a machine with a GPU and without a network:
#
#   ./check.sh [DEVICE] [OUTPUT FOLDER]
#
# Needs Python with torch 2.11.0 for its libtorch. Every path is compared with the CPU in float32 first, then a
# table of speeds is printed. figures.jsonl in the output folder has one line a measurement. Fails where a
# comparison does; speeds fail nothing. With DEVICE cpu:0 the script itself can be tried on any machine.
set -uo pipefail

device=${1:-cuda:0}
out=$(realpath -m "${2:-figures}")
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
mkdir -p "$out"
flowrun=./flowrun
failed=0

say() { printf '\n== %s\n' "$*"; }

torch=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__), torch.__version__)') || exit 1
read -r folder version <<<"$torch"
[[ $version == 2.11.0* ]] || { echo "torch is $version; flowrun is built for 2.11.0"; exit 1; }
export LD_LIBRARY_PATH=$folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

say "flowrun $("$flowrun" --version | cut -d' ' -f2), torch $version"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || lscpu | grep 'Model name'

shapes=(smollm2-135m tinyllama-1.1b)
big=tinyllama-1.1b
rows=(1 8 32 64 128 256)
contexts=(128 512 1024 2048)
new=128
trained=(128 512)
# of the whole flow, which then has the answers of flows/self_reward.toml
prompts=3000 answer=512
if [[ $device == cpu* ]]; then
    shapes=(smollm2-135m) big=smollm2-135m rows=(1 8) contexts=(128) new=16 trained=(32) prompts=60 answer=16
fi

for shape in "${shapes[@]}"; do
    say "doctor: $shape on $device"
    "$flowrun" doctor --device "$device" --model "shapes/$shape" --dummy || failed=1
    "$flowrun" doctor --device "$device" --model "shapes/$shape" --dummy --json 2>/dev/null >"$out/doctor-$shape.json"
done

# measure NAME ARGUMENTS...: a line of figures.jsonl and a row of the table
measure() {
    local name=$1 line
    shift
    if line=$("$flowrun" bench "$@" --device "$device" --model "shapes/$big" --dummy --json); then
        printf '{"name": "%s", "figures": %s}\n' "$name" "$line" >>"$out/figures.jsonl"
        python3 - "$name" "$line" <<'PYTHON'
import json, sys
name, f = sys.argv[1], json.loads(sys.argv[2])
if "step_ms_p50" in f:
    print(f"{name:34} {f['tokens_per_second']:9.0f} {f['decode_tokens_per_second']:9.0f} {f['step_ms_p50']:8.2f} "
          f"{f['step_ms_p99']:8.2f} {100 * f['decode_bandwidth_share']:5.0f} % "
          f"{f['prefill_tokens_per_second']:9.0f} {100 * f['prefill_arithmetic_share']:5.0f} % "
          f"{100 * f['between_steps_share']:6.1f} %")
elif "pairs_per_second" in f:
    print(f"{name:34} {f['pairs_per_second']:9.2f} pairs/s, {f['train_tokens_per_second']:.0f} trained tokens/s, "
          f"{100 * f['train_arithmetic_share']:.0f} % of the matrix rate")
else:
    print(f"{name:34} {f['requests_per_second']:9.1f} requests/s, {f['tokens_per_second']:.0f} tokens/s, "
          f"{100 * f['arithmetic_share']:.0f} % of the matrix rate")
PYTHON
    else
        printf '%-34s failed\n' "$name"
        failed=1
    fi
}

: >"$out/figures.jsonl"
say "$big, random weights, bf16, 32 + $new tokens"
printf '%-34s %9s %9s %8s %8s %7s %9s %7s %8s\n' sequences tokens/s decode/s 'step ms' p99 band prefill/s matrix between
for n in "${rows[@]}"; do
    measure "$n, eager" generate --concurrency "$n" --new-tokens "$new" --eager
    measure "$n, graphs" generate --concurrency "$n" --new-tokens "$new"
done
for n in "${contexts[@]}"; do
    measure "32 after $n" generate --concurrency 32 --prompt-tokens "$n" --new-tokens "$new"
done
measure "48 pairs of 130" score --concurrency 48 --prompt-tokens 130 --new-tokens 1
measure "512 pairs of 130" score --concurrency 512 --prompt-tokens 130 --new-tokens 1
for n in "${trained[@]}"; do
    measure "train 64 pairs, 128 + 2 x $n" train --concurrency 64 --prompt-tokens 128 --new-tokens "$n"
done

say "flows/self_reward.toml, $big, random weights, $prompts prompts, answers of $answer tokens, 3 rounds"
python3 - "$prompts" >"$out/prompts.jsonl" <<'PYTHON'
import json, sys
for i in range(int(sys.argv[1])):
    print(json.dumps({"question": f"Name {i % 7 + 2} things that are {['red', 'tall', 'old', 'quiet'][i % 4]}, number {i}."}))
PYTHON
# Random weights write no verdict that could be read: the judge compares the labels' probabilities, in one order.
if (cd "$out" && "$OLDPWD/$flowrun" "$OLDPWD/flows/self_reward.toml" --fresh --device "$device" \
    --set "models.policy.source=\"$OLDPWD/shapes/$big\"" --set 'models.policy.weights="dummy"' \
    --set 'models.policy.chat_template="{% for m in messages %}{{ m.content }} {% endfor %}"' \
    --set "stages.prompts.dataset=\"$out/prompts.jsonl\"" --set "stages.prompts.take=$prompts" \
    --set "stages.sample.max_new_tokens=$answer" \
    --set 'stages.judge.read="logits"' --set 'stages.judge.order="random"' >self_reward.log 2>&1); then
    tail -n 25 "$out/self_reward.log"
    python3 -c 'import json, sys; s = json.load(open(sys.argv[1])); print("wall", round(s["seconds_wall"], 1), "s")' \
        "$out/runs/self-reward/summary.json"
else
    tail -n 5 "$out/self_reward.log"
    failed=1
fi

say "$([[ $failed == 0 ]] && echo 'all comparisons passed' || echo 'SOMETHING FAILED, see above')"
exit "$failed"
