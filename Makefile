# `make run` and `make test` do everything they need; the other targets are their parts.
.DEFAULT_GOAL := build
.PHONY: setup build run test test-otel kernels soak learn lint bundle

SHELL := bash
# The Makefile's own folder, wherever make is called from; the path may hold spaces.
ROOT := $(shell cd "$$(dirname "$$(sed 's/^ //' <<<'$(MAKEFILE_LIST)')")" && pwd)
IN := cd "$(ROOT)" &&
FLOWRUN := "$${CARGO_TARGET_DIR:-target}/debug/flowrun"

setup:
	@"$(ROOT)/scripts/setup.sh"

build: setup
	$(IN) cargo build --locked

run: build
	$(IN) $(FLOWRUN) flows/quickstart.toml
	$(IN) $(FLOWRUN) generate runs/quickstart "Why is the sky blue?"
	$(IN) $(FLOWRUN) generate runs/quickstart "Give me three tips for a good night's sleep."
	$(IN) $(FLOWRUN) generate runs/quickstart "Write a short thank-you note to a neighbour."

test: setup
	$(IN) if cargo nextest --version >/dev/null 2>&1; \
	    then OMP_NUM_THREADS=1 cargo nextest run --locked && cargo test --locked --doc; \
	    else OMP_NUM_THREADS=1 cargo test --locked; fi

# What is only there with `--features otel`.
test-otel: setup
	$(IN) OMP_NUM_THREADS=1 cargo test --locked --features otel --test it otel::

# Compiles the kernels of a GPU without one, and prints what each takes of it.
kernels: setup
	@"$(ROOT)/scripts/kernels.sh"

# A hundred kills and power losses at moments of a seed, which is printed; FLOWRUN_KILL_SEED, FLOWRUN_KILLS,
# FLOWRUN_POWER_SEED and FLOWRUN_POWER_LOSSES set them.
soak: setup
	$(IN) OMP_NUM_THREADS=1 cargo test --locked --test it -- --ignored --nocapture --test-threads=1 soak_

# Three seeds of flows/iterative_rpo.toml and one with the model as its own judge; writes docs/learning.md.
learn: setup
	$(IN) cargo run --locked --example learn -- page docs/learning.md

lint: setup
	$(IN) cargo fmt --check
	$(IN) cargo clippy --locked --all-targets -- -D warnings
	$(IN) cargo clippy --locked --all-targets --features otel -- -D warnings
	$(IN) RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

bundle: setup
	@"$(ROOT)/scripts/bundle.sh"
