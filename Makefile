# The two commands of the README: `make demo` and `make test`. Each makes .venv where it is missing.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
STAMP   = $(VENV)/.mwm-installed

.PHONY: demo test sanitize install bench clean

install: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(shell find csrc kernels python bench -type f -not -name '*.pyc' 2>/dev/null)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mwm needs Python 3.10 or newer; set PYTHON=/path/to/python3.x"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet ".[test]"
	@touch $(STAMP)

demo: install
	$(PY) -m mwm demo

test: install
	$(PY) -m pytest

sanitize: install
	$(PY) -m pip install --quiet pybind11 cmake ninja
	PYTHON=$(PY) scripts/sanitize.sh

# Every row is appended to the table as it is measured; about twenty-five minutes on two quiet cores.
bench: install
	$(PY) -m mwm bench all --csv bench/results/cpu.csv
	$(PY) -m mwm.bench.report --csv bench/results/cpu.csv --out bench/RESULTS.md

clean:
	rm -rf build dist $(STAMP)
