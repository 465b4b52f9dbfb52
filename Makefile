.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(READY): requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14)))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.13. Name one that is: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements-dev.lock
	@$(BIN)/python -m pip --version > /dev/null
	@touch $@

setup: $(READY) ## Create the virtual environment with the pinned packages

demo: $(READY) ## End-to-end demo on generated data: servers, lakehouse, model, answers over HTTP
	@$(BIN)/python -m app demo

# Two processes for two cores. Tests that share a module fixture stay in one process, all others are spread (tests/conftest.py).
test: $(READY) ## Fast tests, in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

# Two runs: first the slow tests that can share the machine, in two processes; then, one at a time, those marked `serial`, which
# measure response times or need all cores for Ray Serve.
test-slow: $(READY) ## Slow tests: kills, Ray, servers under load, the model from training to rollback, serving
	@$(BIN)/python -m pytest -m "slow and not serial" -n 2 --dist loadgroup
	@$(BIN)/python -m pytest -m "slow and serial"

build/iceberg-rest/.ready: tests/servers/iceberg-pom.xml
	@mvn -q -B -f $< dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/build/iceberg-rest
	@touch $@

build/iceberg-spark/.ready: Makefile
	@mvn -q -B dependency:copy -Dartifact=org.apache.iceberg:iceberg-spark-runtime-4.0_2.13:1.10.0 -DoutputDirectory=$(CURDIR)/build/iceberg-spark
	@touch $@

build/engines/.ready: pyproject.toml
	@test -x build/engines/bin/python || $(PYTHON) -m venv build/engines
	@$(BIN)/uv pip install --quiet --python build/engines/bin/python --group pyproject.toml:engines
	@touch $@

test-servers: $(READY) build/iceberg-rest/.ready build/iceberg-spark/.ready build/engines/.ready ## Tests against genuine servers, catalogs and engines; needs Java 17, Maven and Go
	@$(BIN)/python -m pytest -m servers -n 2 --dist loadfile --durations 10 tests/servers

test-commits: $(READY) ## The commit protocol: writers interrupted between any two steps; COMMIT_SCHEDULES (10000) random schedules
	@COMMIT_SCHEDULES=$${COMMIT_SCHEDULES:-10000} $(BIN)/python -m pytest -m "slow or not slow" tests/lakehouse/test_commit_model.py

test-cluster: $(READY) ## Ray jobs on several nodes, nodes killed; 200 faults in a run of 200,000 orders; needs root, Go and Java 17
	@$(BIN)/python -m pytest -m "cluster or faults" --durations 10 tests/cluster tests/app/test_deploy.py

test-faults: $(READY) ## Only the faults: processes killed, store and disk failing
	@$(BIN)/python -m pytest -m faults tests/cluster/test_faults.py

test-all: $(READY) ## All tests, one at a time
	@$(BIN)/python -m pytest -m ""

lint: $(READY) ## Style, types, import direction and cycles, layout, generated docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layout.py
	@$(BIN)/python -m app docs --check

docs: $(READY) ## Generate docs/reference/ from the declarations
	@$(BIN)/python -m app docs

bench: $(READY) ## Cost of an incremental change against a full build; training set against a plain script
	@$(BIN)/python bench/incremental.py
	@$(BIN)/python bench/training_set.py

bench-serve: $(READY) ## Serving compared with a bare server and MLflow's server; needs wrk
	@$(BIN)/python bench/serving.py

# requirements.lock is what nodes and images install; requirements-dev.lock adds what the tests need.
LOCK := $(BIN)/uv pip compile --quiet --universal --no-header --no-emit-index-url --no-annotate --generate-hashes pyproject.toml
lock: ## Update the pinned packages in requirements.lock and requirements-dev.lock
	$(LOCK) --group dev -o requirements-dev.lock
	$(LOCK) --constraints requirements-dev.lock -o requirements.lock

audit: $(READY) ## Known vulnerabilities of the pinned packages; needs pypi.org
	$(BIN)/uv tool run pip-audit==2.10.1 --disable-pip --require-hashes -r requirements-dev.lock

clean: ## Remove the virtual environment and all local state
	rm -rf $(VENV) .shopsphere build

.PHONY: help setup demo test test-slow test-servers test-commits test-cluster test-faults test-all lint docs bench bench-serve lock audit clean
