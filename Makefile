# make demo      everything in a quarter of an hour on two CPU cores: data, training, evaluation, report
# make test      the whole test suite
# make train     CONFIG=accelerate_configs/X.yaml SCRIPT=scripts/train_unet.py ARGS="…": one training, as accelerate launches it
# make dashboard what the runs in outputs/ look like
# make style     ruff and mypy
# make bench     the benchmarks (benchmarks/README.md)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= accelerate_configs/cpu.yaml
SCRIPT ?= scripts/train_unet.py
ARGS ?= --config demo

.PHONY: demo test train dashboard style bench

demo: $(READY)
	$(BIN)/python scripts/run_recipe.py --config scripts/recipes/demo.yaml --output_dir outputs/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

train: $(READY)
	$(BIN)/accelerate launch --quiet --config_file $(CONFIG) $(SCRIPT) $(ARGS)

dashboard: $(READY)
	$(BIN)/streamlit run dashboard

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/step_limit.py
	$(BIN)/python benchmarks/memory_flat.py
	$(BIN)/python benchmarks/damaged_images.py

# The environment is made in a folder of its own name and marked ready at the end: an interrupted install is made anew.
$(READY): requirements.txt scripts/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or later is needed; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $(READY)
