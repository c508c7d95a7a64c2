# hanok: `make run` is the first five minutes, `make test` proves that it works. Everything lives in $(VENV) and HANOK_HOME.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= index
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check
READY   = $(VENV)/.hanok-ready
EXTRAS  = data,plot,dev

# TORCH=cpu and TORCH=cuda take PyTorch from its own index; TORCH=index takes what your package index has.
TORCH_URL_cpu  = --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_URL_cuda = --extra-index-url https://download.pytorch.org/whl/cu130
TORCH_URL      = $(TORCH_URL_$(TORCH))

.PHONY: setup run test check bench conformance docs notes clean
.DEFAULT_GOAL := run

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hanok needs Python 3.11 or newer; '$(PYTHON)' is older or missing. Name another: make setup PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "'$(PYTHON)' has no venv or pip. On Debian and Ubuntu: apt-get install python3-venv python3-pip"; exit 2; }
	@case "$(TORCH)" in index|cpu|cuda) ;; *) echo "TORCH is '$(TORCH)'; expected cpu, cuda, or nothing"; exit 2;; esac
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): a few minutes the first time"
	@$(PIP) install --quiet --upgrade pip setuptools -c constraints.txt
	@$(PIP) install --quiet $(TORCH_URL) torch -c constraints.txt
	@$(PIP) install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

run: setup
	@$(BIN)/hanok quickstart $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_law.py
	@$(BIN)/python scripts/docs.py --check
	@$(BIN)/python scripts/notes.py --check

docs: setup
	@$(BIN)/python scripts/docs.py

notes: setup
	@$(BIN)/python scripts/notes.py

bench: setup
	@for bench in decode startup recurrent training_step compiled; do $(BIN)/python benchmarks/$$bench.py || exit 1; done

conformance: setup
	@$(BIN)/python scripts/peers.py
	@$(BIN)/python -m pytest -m conformance $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
