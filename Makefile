PYTHON ?= python3
BIN := .venv/bin
# CPU builds of torch come from its own index; where only one index is reachable, set TORCH to what pip should install.
TORCH ?= torch==2.13.0

.PHONY: demo test bench tables clean
demo: .venv/ready
	$(BIN)/python -m demo

test: .venv/ready
	$(BIN)/ruff check aoquant_inductor demo tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: .venv/ready
	$(BIN)/python -m benchmarks.bench_host
	$(BIN)/python -m benchmarks.bench_linear

# The README's tables and plots from benchmarks/results.
tables: .venv/ready
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.readme

# Everything the two commands need; made again when the dependencies change.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[bench,demo,dev]"
	touch $@

clean:
	rm -rf .venv .cache build *.egg-info
