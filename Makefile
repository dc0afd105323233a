# Everything on a fresh machine with Python 3.10 or newer: `make train`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NANO := examples/nano

.PHONY: train announce photos test test-long install lint docs bench twin clean

# the embedded example: a pretrained nano FLUX learns a shape it has never seen; see runs/nano/
train: announce $(VENV)/installed
	$(BIN)/fluxfast train $(NANO)/zorb.yaml --restart

announce:
	@test -e $(VENV)/installed || echo "First the install into $(VENV)/: several gigabytes, some minutes."
	@echo "A nano FLUX of 3.7 million parameters learns a new shape in" \
		"$(shell sed -n 's/^  steps: *//p' $(NANO)/zorb.yaml) steps: at most a minute on two CPU cores."
	@echo "Then open runs/nano/report.html and runs/nano/samples.png."

# photographs of every kind of file, through a nano FLUX with random weights; see runs/photos/
photos: $(VENV)/installed
	$(BIN)/python $(NANO)/make_nano.py
	$(BIN)/fluxfast train $(NANO)/train.yaml --restart

# two processes at a time, a file each: the fixtures of a file are made once. In the order of the
# files: reordered by their number of tests, the few that are long would come last
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

# what takes minutes: 200 steps against 100 and 100, fifty kills, 12 billion parameters in and out,
# memory's peaks, and longer fuzzing
test-long: $(VENV)/installed-test
	$(PYTEST) -m 'slow and not gpu'
	HYPOTHESIS_EXAMPLES=3000 $(BIN)/pytest -n $(WORKERS) tests/robustness/test_fuzz.py

install: $(VENV)/installed

define set_up
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fluxfast needs Python 3.10 or newer, this is " + sys.version.split()[0])'
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
endef

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(set_up) .
	touch $@

# with what the tests need in one go: two installs take half a minute longer
$(VENV)/installed-test: pyproject.toml setup.py constraints.txt
	$(set_up) '.[test]'
	touch $(VENV)/installed $@

# ruff, pyright and whitespace, as before a commit
lint: $(VENV)/installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

$(VENV)/installed-dev: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

# what is generated: the tables and charts of the pages, and the page of settings
docs: $(VENV)/installed
	$(BIN)/python -m bench.report
	$(BIN)/python -m fluxfast.config.reference > docs/config.md

# the benchmark suite, beside its peers; on a GPU machine: make bench DEVICE=cuda
DEVICE ?= cpu
bench: $(VENV)/installed-test
	$(BIN)/python -m bench.run --suite $(if $(filter cuda,$(DEVICE)),gpu,cpu)

# whole runs at FLUX.1-dev's size on cards that are not here, over torch's own CUDA build: an hour
twin: $(VENV)/installed-test
	$(BIN)/python -m bench.twin.cuda

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
