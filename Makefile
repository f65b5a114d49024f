# POSIX sh, make 3.81. `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
INSTALLED := $(VENV)/.installed

# The user's own Prefect is never touched: its variables are dropped, home and profiles lie in the checkout,
# and the empty API URL makes a run start a temporary server by itself.
PREFECT_ENV = env $$(env | sed -n 's/^\(PREFECT_[A-Z0-9_]*\)=.*/-u \1/p') \
	PREFECT_HOME="$(CURDIR)/.prefect" PREFECT_PROFILES_PATH="$(CURDIR)/.prefect/profiles.toml" PREFECT_API_URL= \
	PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=true PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1

# A server with workers: alone on the machine, or SQLite's waits become errors in the server's log.
LIVE_TESTS := tests/orchestration/test_kills.py tests/orchestration/test_workers.py

.PHONY: help install demo test test-slow lint gpu-check up schedule down clean

help:
	@echo "make demo    install, run the whole method on the built-in figures setting, write output/demo/report.html"
	@echo "make test    install, then lint, tests and types; no network after the install"
	@echo "make test-slow  the tests that take minutes to hours, resumable by file; FRESH=1 starts over"
	@echo "make gpu-check  ten minutes on a GPU: agrees with the CPU? how fast? writes docs/gpu; without one a tiny run"
	@echo "make up      a local Prefect server with UI and workers; make schedule: nightly re-scoring; make down: end all"
	@echo "make clean   remove the demo's output"
	@echo "Another torch build: make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed and none was found"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "error: $(PYTHON) lacks venv: install it (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "Installing into $(VENV) (the first time takes a few minutes)"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") -c constraints.txt torch
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"

demo: $(INSTALLED)
	@$(PREFECT_ENV) "$(BIN)/hgdpo" run --preset figures --root output/demo --publish output/demo

# One process more than cores, for many tests wait; types are checked beside the live tests, which mostly do.
test: $(INSTALLED)
	@"$(BIN)/ruff" check .
	@$(PREFECT_ENV) HF_HUB_OFFLINE=1 "$(BIN)/python" -m pytest --dist loadfile $(LIVE_TESTS:%=--ignore %) \
		-n "$$("$(BIN)/python" -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')"
	@nice -n 19 "$(BIN)/basedpyright" --pythonpath "$(BIN)/python" >"$(VENV)/types.txt" 2>&1 & types=$$!; \
	$(PREFECT_ENV) HF_HUB_OFFLINE=1 "$(BIN)/python" -m pytest $(LIVE_TESTS); tests=$$?; \
	wait $$types; types=$$?; cat "$(VENV)/types.txt"; exit $$((tests + types))

# One file after another; what has passed at this commit is skipped. The summary is in output/slow/summary.txt.
test-slow: $(INSTALLED)
	@$(PREFECT_ENV) HF_HUB_OFFLINE=1 "$(BIN)/python" tests/slow.py $(if $(FRESH),--fresh)

lint: $(INSTALLED)
	@"$(BIN)/ruff" check .
	@"$(BIN)/basedpyright" --pythonpath "$(BIN)/python"

gpu-check: $(INSTALLED)
	@HF_HUB_OFFLINE=1 "$(BIN)/python" -m benchmarks.gpu_check

up: $(INSTALLED)
	@"$(BIN)/python" -m deployments.local up

schedule: $(INSTALLED)
	@"$(BIN)/python" -m deployments.local schedule

down: $(INSTALLED)
	@"$(BIN)/python" -m deployments.local down

clean:
	@test ! -f .prefect/up/local.json || { echo "error: a local Prefect server is up: make down first"; exit 1; }
	rm -rf output/demo .prefect
