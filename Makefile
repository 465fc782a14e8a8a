# The commands of this repository; each sets up what it needs in .venv.
VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed
NEWEST := .venv-newest
QUICK := tests/spindle tests/exchange tests/printed tests/timeline tests/whole_repo/test_layout.py \
	tests/whole_repo/test_wheel.py tests/capture/test_families.py tests/parity/test_modes.py tests/parity/test_weigh.py \
	tests/runtime/programs/test_lower.py tests/runtime/comms/test_transport.py tests/runtime/launch/test_processes.py

.PHONY: demo test newest lint audit docs clean

demo: $(STAMP)  ## the main job: plan, train in waves on Ray, verify, timeline
	$(VENV)/bin/python docs/examples/digits/demo.py --out demo-out

test: $(STAMP)  ## all tests, on two cores; those that start Ray last
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not ray"
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m ray tests/distributed

newest:  ## a quick part of the tests with the newest release of every dependency, in a venv of its own
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --upgrade torch
	$(NEWEST)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
	$(NEWEST)/bin/python -m pytest -q -n 2 -m "not ray" $(QUICK)

lint: $(STAMP)  ## formatting, lint, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

audit: $(STAMP)  ## pinned packages: advisories, releases that were taken back, what is installed and not pinned
	$(VENV)/bin/python -m tests.whole_repo.audit

docs: $(STAMP)  ## the pages as a site in build/site; a broken link is an error
	$(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(NEWEST) build dist demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch comes first: with a CPU build in place nothing pulls gigabytes of CUDA in. The reports are for `make audit`.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt --upgrade pip
	mkdir -p $(VENV)/reports
	$(VENV)/bin/python -m pip install -q -c constraints.txt --report $(VENV)/reports/torch.json torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt --report $(VENV)/reports/rest.json -e '.[dev]'
	touch $(STAMP)
