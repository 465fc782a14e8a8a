# The commands of this repository; each sets up what it needs in .venv.
VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs clean

demo: $(STAMP)  ## the main job: plan, train in waves on Ray, verify, timeline
	$(VENV)/bin/python docs/examples/digits/demo.py --out demo-out

test: $(STAMP)  ## all tests, on two cores; those that start Ray last
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not ray"
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m ray

lint: $(STAMP)  ## formatting, lint, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

docs: $(STAMP)  ## the pages as a site in build/site; a broken link is an error
	$(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch comes first: with a CPU build in place nothing pulls gigabytes of CUDA in.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)
