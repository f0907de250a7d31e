# make train    install into .venv and train the Stable Diffusion that ships with the project (ARGS="--seed 1" and so on)
# make test     install and run the tests (ARGS="-k evaluation" and so on)
# make check    the tests without the slow ones
# make bench    time kernels beside their rivals and whole iterations beside a plain trainer (ARGS="-k geglu", "-k test_iteration --repeats 5" and
#               so on); without a GPU the kernels are a smoke test, and iterations those of the small model
# make docs     write the documentation as a site, site/index.html; `.venv/bin/mkdocs serve` shows it
# make lint     check style, formatting and types
# make clean    remove .venv and caches; runs stay

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: train test check bench docs lint clean

train: .venv/installed
	$(BIN)/python -m fastgrpo.train $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds $(ARGS)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One pip call for everything: a second one would be free to replace torch by another build.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .benchmarks
	find fastgrpo kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
