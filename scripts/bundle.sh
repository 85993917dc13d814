#!/usr/bin/env bash
# Packs what a GPU machine without a network needs into dist/: the stripped program, the flows, shapes of models
# for random weights, and check.sh, which checks and measures there what matters most first.
#
#   FLOWRUN_PROFILE=dev   packs the development build in place of a release
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
profile=${FLOWRUN_PROFILE:-release}
folder=$([[ $profile == dev ]] && echo debug || echo "$profile")
cargo build --locked --profile "$profile"

work=dist/flowrun-bundle
rm -rf "$work"
mkdir -p "$work"
strip -o "$work/flowrun" "${CARGO_TARGET_DIR:-target}/$folder/flowrun"
cp -r scripts/bundle/. flows "$work/"
rm -rf "$work"/__pycache__
tar -czf dist/flowrun-bundle.tar.gz -C dist flowrun-bundle
size=$(stat -c %s dist/flowrun-bundle.tar.gz)
printf 'dist/flowrun-bundle.tar.gz: %d MiB\n' $((size >> 20))
if ((size >= 60 << 20)); then
    echo "the bundle is larger than 60 MiB" >&2
    exit 1
fi
