# Shortcuts. Nothing but convenience: what they do stands in tools/check, tests/run_all.py and .ci/run.

python := ".venv/bin/python"

# List the recipes.
default:
    @just --list

# Make .venv with everything a developer needs, and the package itself, optimised.
setup:
    test -d .venv || python3 -m venv .venv
    .venv/bin/pip install -q '.[dev]'
    .venv/bin/maturin develop --release --quiet
    .venv/bin/pre-commit install

# Rebuild the compiled module in place (editable install).
build *args:
    .venv/bin/maturin develop --release --quiet {{ args }}

# Formatters, linters, types, stubs, arrows: all, or the named steps.
check *steps:
    tools/check {{ steps }}

# Let formatters and linters correct what they can.
fix:
    tools/check --fix

# All tests, Rust and Python.
test:
    {{ python }} tests/run_all.py

# The engine's tests.
test-rust *args:
    cargo test {{ args }}

# The package's tests (after `just build`).
test-python *args:
    {{ python }} -m pytest {{ args }}

# What the package costs, beside what real KVM and other tools take: all sections, or the named.
bench *args:
    .venv/bin/shadowkvm bench {{ args }}

# The engine's benches for development (criterion).
bench-engine *args:
    cargo bench {{ args }}

# Fuzz the engine (fuzz/README.md): a target, seconds.
fuzz target="ops" seconds="600":
    cd fuzz && cargo fuzz run --sanitizer none {{ target }} -- -max_len=2402 -max_total_time={{ seconds }}

# The documentation, into docs/_build.
docs:
    {{ python }} -m sphinx -W --keep-going -q docs docs/_build

# What CI does, in a fresh clone of HEAD.
ci:
    rm -rf target/ci && git clone -q . target/ci && target/ci/.ci/run
