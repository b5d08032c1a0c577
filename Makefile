# Two commands for a newcomer: `make demo` and `make test`. Both make their own virtual environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2

.PHONY: demo test setup check format lint types imports everyday labs mutations parity matrix adapters adapter-sweep preferences reinforcement bench memory-table published base clean

demo: $(VENV)/.installed  ## fine-tune the shipped model on the embedded task, on two processes
	$(BIN)/loomtune train

test: $(VENV)/.installed  ## the everyday suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

setup: $(VENV)/.installed

# torch first and alone: any other way of asking for it pulls gigabytes of CUDA packages. DeepSpeed builds against it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel hatchling editables packaging
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,quantised,sweeps]'
	touch $@

check: format lint types imports test  ## everything that must hold before a commit

format: $(VENV)/.installed
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports

labs: $(VENV)/.installed  ## several nodes for real: network namespaces, sshd, Slurm (root, and their packages; skips what is absent)
	$(BIN)/python -m pytest -q -m lab tests/labs $(ARGS)

mutations: $(VENV)/.installed  ## break the code on purpose and see that a test notices (docs/testing.md)
	$(BIN)/python tests/mutations.py

parity: $(VENV)/.installed  ## one run under every layout, compared; ARGS=--all for the full product, --write for docs/parity.md
	$(BIN)/python tests/parity.py $(ARGS)

matrix: $(VENV)/.installed  ## train, move and export every combination that is said to work; ARGS=--write for docs/matrix.md
	$(BIN)/python tests/matrix.py $(ARGS)

adapters: $(VENV)/.installed  ## every adapter alone, under FSDP2 and ZeRO 3; ARGS=--write for docs/adapters.md
	$(BIN)/python tests/adapters.py $(ARGS)

adapter-sweep: $(VENV)/.installed  ## every adapter on the embedded task, rates searched (an hour); ARGS=--write
	$(BIN)/python benchmarks/adapters.py $(ARGS)

preferences: $(VENV)/.installed  ## DPO, a reward model and distillation on the embedded task, three seeds (two hours); ARGS=--write
	$(BIN)/python benchmarks/preferences.py $(ARGS)

reinforcement: $(VENV)/.installed  ## GRPO and PPO by executing queries, three seeds (an hour); ARGS=--write
	$(BIN)/python benchmarks/reinforcement.py $(ARGS)

recipes: $(VENV)/.installed  ## plan every recipe of a large model for its documented world; ARGS=--write for docs/recipes.md
	$(BIN)/python benchmarks/recipes.py $(ARGS)

bench: $(VENV)/.installed  ## SFT and DPO against TRL, interleaved; ARGS='--write docs/benchmarks.md'
	$(BIN)/python -m pip install -q -c constraints.txt trl
	$(BIN)/python benchmarks/sft.py $(ARGS)
	$(BIN)/python benchmarks/dpo.py $(ARGS)
	$(BIN)/python benchmarks/sharing.py $(ARGS)

memory-table: $(VENV)/.installed  ## predicted against measured memory, real runs; ARGS=--write for docs/planning-memory.md
	DS_ACCELERATOR=cpu $(BIN)/python benchmarks/memory.py $(ARGS)

published: $(VENV)/.installed  ## forecasts beside what others have measured and published (a quarter of an hour); ARGS='--write docs/planning-published.md'
	$(BIN)/python benchmarks/published.py $(ARGS)

base: $(VENV)/.installed  ## make the shipped model anew from generated text
	$(BIN)/python -m loomtune_plugins.models.tiny.make

clean:
	rm -rf $(VENV) runs
