.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14)))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.13. Give one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	@$(BIN)/python -m pip --version > /dev/null
	@touch $@

setup: $(READY) ## Make the virtual environment with the pinned packages

demo: $(READY) ## Real source servers, a seeded shop, all layers, answers
	@$(BIN)/python -m app demo

test: $(READY) ## The fast tests, two at a time
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) ## The slow tests: kills, Ray, servers under load, the model from shop to rollback, serving under fire
	@$(BIN)/python -m pytest -m slow -n 2 --dist load tests/pipelines/test_kill.py tests/pipelines/test_rebuild.py tests/lakehouse/test_engine.py \
		tests/pipelines/test_laws.py tests/lakehouse/test_ray_tasks.py tests/lakehouse/test_object_store.py tests/pipelines/test_online_retail_lakehouse.py tests/pipelines/test_erasure.py tests/pipelines/test_erasure_kill.py
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile tests/ml/test_fraud_model.py tests/ml/test_training.py \
		tests/ml/test_registry.py tests/ml/test_order_features.py
	@$(BIN)/python -m pytest -m slow tests/serve/test_serve_on_ray.py tests/serve/test_http.py tests/serve/test_openapi.py tests/app/test_demo.py

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

test-servers: $(READY) build/iceberg-rest/.ready build/iceberg-spark/.ready build/engines/.ready ## Genuine servers, catalogs and engines; needs Java 17, Maven and Go
	@$(BIN)/python -m pytest -m servers -n 2 --dist loadfile --durations 10 tests/servers

test-cluster: $(READY) ## Ray jobs on several nodes, nodes killed; 200 faults over a run of 200,000 orders; needs root, Go and Java 17
	@$(BIN)/python -m pytest -m "cluster or faults" --durations 10 tests/cluster tests/app/test_deploy.py

test-faults: $(READY) ## Of these the faults alone: processes killed, store and disk failing
	@$(BIN)/python -m pytest -m faults tests/cluster/test_faults.py

test-all: $(READY) ## All tests, the slow ones too
	@$(BIN)/python -m pytest -m ""

lint: $(READY) ## Style, types, import direction, generated docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m app docs --check

docs: $(READY) ## Generate docs/reference/ from the declarations
	@$(BIN)/python -m app docs

bench: $(READY) ## What a change costs against the full build; the training set against a plain script
	@$(BIN)/python bench/incremental.py
	@$(BIN)/python bench/training_set.py

bench-serve: $(READY) ## Serving beside a bare server and MLflow's; needs wrk
	@$(BIN)/python bench/serving.py

lock: ## Pin the packages anew (universal, no addresses)
	$(BIN)/uv pip compile --quiet --universal --no-header --no-emit-index-url --no-annotate --group dev pyproject.toml -o requirements.lock

clean: ## Remove the virtual environment and everything local
	rm -rf $(VENV) .shopsphere build

.PHONY: help setup demo test test-slow test-servers test-cluster test-faults test-all lint docs bench bench-serve lock clean
