# Two commands do all the set-up: `make run` and `make test`. Both build .venv once, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread is fastest for the tiny models that tests and the default run use; see README.
export OMP_NUM_THREADS ?= 1

.PHONY: run test tests docs test-servers quality kernels mutants lock clean

# The locked pip comes first: it applies the lock also where a package is built from source (--build-constraint).
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) --build-constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --build-constraint constraints.txt --editable '.[dev]'
	touch $@

run: $(VENV)/installed ## distil the head of a shipped backbone of twelve layers, and measure it
	$(BIN)/python -m mtptrain +recipe=distill backbone=tiny12
	@echo "next: source $(BIN)/activate, open report.html, and try README.md, section I want to"

quality: $(VENV)/installed-dev ## what CI checks before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

kernels: $(VENV)/installed-dev ## compile the Triton kernels for GPUs that need not be here; prints what they take
	$(BIN)/python -m mtptrain.kernels.aot

# Tests start many processes: Python keeps what it compiled, whatever PYTHONDONTWRITEBYTECODE says.
tests: kernels
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 3 --dist worksteal

# mypy runs on one core, so the tests run beside it.
test: $(VENV)/installed-dev ## lint, types, kernels and tests
	$(MAKE) --no-print-directory --jobs 2 quality tests

docs: $(VENV)/installed-dev ## build the site of the documentation into build/site, from which index.html opens
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "wrote build/site/index.html; with its search field: python3 -m http.server -d build/site"

test-servers: $(VENV)/installed-dev ## download vLLM (336 MB) and SGLang (39 MB) by name; run their loaders on exports; not in CI
	$(BIN)/python -m pytest -s tests/servers/check_loaders.py tests/servers/check_sglang.py

mutants: $(VENV)/installed-dev ## plant single faults and print the test, certificate or control that notices each
	$(BIN)/python -m tests.mutants

lock: ## choose the newest versions that pyproject.toml allows, and write them to constraints.txt
	$(PYTHON) scripts/lock.py

clean:
	rm -rf $(VENV) build dist *.egg-info outputs .mypy_cache .pytest_cache .ruff_cache
