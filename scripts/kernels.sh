#!/usr/bin/env bash
# Compiles the GPU's kernels for sm_80, sm_90 and sm_100 with NVRTC, which is fetched once into .nvrtc/ by its
# pinned hash and needs no GPU, and prints registers, shared memory and spills of each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=.nvrtc
library=nvidia/cu13/lib/libnvrtc.so.13
requirement=$(grep '^nvidia-cuda-nvrtc==' scripts/libtorch-cuda.txt)

# The libraries of a GPU's set-up have it already.
if [[ -f .libtorch/$library ]]; then
    folder=.libtorch
elif [[ ! -f $folder/$library ]]; then
    echo "kernels: NVRTC into $folder/ (once)" >&2
    rm -rf "$folder.tmp"
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
        python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --require-hashes \
        --target "$folder.tmp" --requirement /dev/stdin <<<"$requirement"
    rm -rf "$folder"
    mv "$folder.tmp" "$folder"
fi
FLOWRUN_NVRTC=$PWD/$folder/$library \
    cargo test --locked --lib -- --ignored --exact --nocapture torch::nvrtc::tests::kernels_compile
