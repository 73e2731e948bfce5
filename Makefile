# Two commands do all the set-up: `make run` and `make test`. Both build .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread is fastest for the tiny models that tests and the default run use; see README.
export OMP_NUM_THREADS ?= 1

.PHONY: run test quality kernels clean

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

run: $(VENV)/installed ## distil the shipped head on the shipped backbone and measure it
	$(BIN)/python -m mtptrain +recipe=distill

quality: $(VENV)/installed-dev ## what CI checks before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

kernels: $(VENV)/installed-dev ## compile the Triton kernels for GPUs that need not be here; prints what they take
	$(BIN)/python -m mtptrain.kernels.aot

test: quality kernels ## lint, types, kernels and tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(VENV) build dist *.egg-info outputs .mypy_cache .pytest_cache .ruff_cache
