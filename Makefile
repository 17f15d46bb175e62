# `make demo` installs and runs the suite on the built-in world; `make test` installs and runs every test.
# Everything installs into .venv by itself on first use and does nothing when it is up to date.

PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= dev
# Processes side by side, each with one thread.
PARALLEL := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
WORKERS := -n auto --dist loadfile -p no:nbmake
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Kept: compiling `lib` with its checks and the tests' assertions costs each process 20 seconds.
export PYTHONDONTWRITEBYTECODE :=
# Waiting threads sleep: on a busy machine, spinning makes small tensor operations seven times slower.
export OMP_WAIT_POLICY := passive

.PHONY: demo test chromium lab resolve bench bench-gpu bench-all peers lint models saes figures clean

demo: .venv/installed-$(EXTRAS)
	@for notebook in $(NOTEBOOKS); do \
	  name=$$(basename $$notebook .ipynb); mkdir -p papermill_runs/$$name/default; \
	  HF_HUB_OFFLINE=1 $(BIN)/papermill --no-progress-bar --log-output $$notebook \
	    papermill_runs/$$name/default/$$name.ipynb || exit 1; \
	  echo "done: papermill_runs/$$name/default/$$name.ipynb"; \
	done
	@echo "To change and run them yourself: make lab"

test: .venv/installed-$(EXTRAS) chromium
	$(PARALLEL) $(BIN)/pytest $(WORKERS) -m "not slow" tests
	$(PARALLEL) LATENT_BENCH_TYPES=0 $(BIN)/pytest $(WORKERS) -m slow tests
	$(PARALLEL) $(BIN)/pytest -n 2 --nbmake --nbmake-timeout=900 notebooks

# The browser that tests/test_lab.py drives. Where it cannot be installed, that test is skipped.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  test $$(id -u) = 0 || sudo="sudo -n"; apt="$$sudo apt-get -qq -o Acquire::http::Timeout=20"; \
	  { $$apt update; $$apt install --yes --no-install-recommends chromium; } < /dev/null; \
	} || echo "tests/test_lab.py will be skipped: chromium is missing and could not be installed"

lab: .venv/installed-$(EXTRAS)
	$(BIN)/jupyter lab notebooks

# Asks the index whether the constraints fit the published wheels; downloads metadata, installs only uv.
resolve: .venv/installed-$(EXTRAS)
	$(BIN)/python -m pip install --quiet uv
	@for version in 3.11 3.12 3.13; do \
	  $(BIN)/uv pip compile --quiet --no-config --output-file /dev/null --constraint constraints.txt \
	    --extra dev --extra bench --python-version $$version --python-platform x86_64-manylinux_2_28 \
	    pyproject.toml && echo "Python $$version: constraints fit" || exit 1; \
	done

# Training beside its peers and its floor: prints a table, writes figures/bench.json and its plot.
bench: peers
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_training

bench-gpu: peers
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_training --device cuda

# Every other figure that depends on the machine, too.
bench-all: bench
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_data
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_truth
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_recovery
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_spalf step
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_spalf frontier
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench_jumprelu

# The libraries that `make bench` races against.
peers: .venv/installed-peers

lint: .venv/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify $(NOTEBOOKS)

models: .venv/installed-$(EXTRAS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m lib.models.tiny
	HF_HUB_OFFLINE=1 $(BIN)/python -m lib.analysis.diffing.ship

saes: .venv/installed-$(EXTRAS)
	@for run in shipped shipped_layer0; do \
	  mkdir -p papermill_runs/06_dictionaries/$$run; \
	  HF_HUB_OFFLINE=1 $(BIN)/papermill --no-progress-bar notebooks/06_dictionaries.ipynb \
	    papermill_runs/06_dictionaries/$$run/06_dictionaries.ipynb -f papermill_runs/examples/06_$$run.yaml || exit 1; \
	done

figures: .venv/installed-$(EXTRAS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.readme_figures

clean:
	rm -rf .venv

# The environment is rebuilt when what it is made from changes.
.venv/installed-$(EXTRAS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "need Python 3.11 or newer, got $$($(PYTHON) --version); name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# dictionary-learning asks for an old nnsight, overcomplete for torchvision and OpenCV; training
# uses neither, so these two come without what they ask for.
.venv/installed-peers: .venv/installed-$(EXTRAS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps dictionary-learning==0.1.0 overcomplete==0.3.0
	@touch $@
