# Every target is safe to run twice; set-up that is already there costs a fraction of a second.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=

.PHONY: help setup run kafka test test-unit test-deps test-security e2e faults lint types imports fmt lock bench bench-capture bench-endurance bench-ingest bench-forwarder bench-outage bench-journal bench-logs bench-query bench-replay clean

help: ## Show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

setup: ## Make .venv from the lock file
	@scripts/setup.sh

run: setup ## Run everything on this machine: proxy on 8080, API on 8000 (ARGS="--kafka localhost:9092" for a real Kafka)
	@exec .venv/bin/megido up --data-dir .megido --log-dir logs/proxy $(ARGS)

kafka: setup ## Run one Apache Kafka node on localhost:9092 (fetched once; needs Java 17 and Maven)
	@$(PY) scripts/kafka.py fetch
	@exec $(PY) scripts/kafka.py run $(ARGS)

test-deps: setup ## Fetch what the tests need: Kafka, Chromium
	@$(PY) scripts/kafka.py fetch
	@scripts/browser.sh

test: test-deps lint types imports ## Everything: lint, types, import rules, all tests (real Kafka, Postgres and Chromium)
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-unit: setup ## The tests that need no service
	@$(PY) -m pytest tests/unit $(ARGS)

test-security: setup ## The security model, line by line
	@$(PY) -m pytest tests/security $(ARGS)

e2e: test-deps ## The whole pipeline on both buses, with curl and Chromium
	@$(PY) -m pytest tests/e2e $(ARGS)

faults: test-deps ## The long form of the kill and outage tests; prints seed and balance of each
	@MEGIDO_KILLS=20 MEGIDO_FAULT_SECONDS=60 $(PY) -m pytest tests/faults -v -s $(ARGS)
	@MEGIDO_BODY_MB=1024 $(PY) -m pytest tests/integration/capture/test_bodies.py --timeout 900 $(ARGS)

lint: setup ## Style and formatting
	@.venv/bin/ruff check --no-cache .
	@.venv/bin/ruff format --no-cache --check .

types: setup ## mypy --strict
	@.venv/bin/mypy

imports: setup ## The architecture's import rules
	@.venv/bin/lint-imports --no-logo

fmt: setup ## Format, and mend what can be mended
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

bench-replay: setup ## The replayer's sender against aiohttp
	@$(PY) -m benchmarks.replay $(ARGS)

bench: bench-capture bench-ingest ## The two benchmarks of the claims

bench-capture: setup ## Full capture against bare mitmdump
	@$(PY) -m benchmarks.capture $(ARGS)

bench-endurance: setup ## Memory over 200,000 flows, 1 GB bodies, 1,000,000 WebSocket messages (ARGS="--only flows --flows 20000")
	@$(PY) -m benchmarks.endurance $(ARGS)

bench-ingest: setup ## Exactly-once ingest against plain COPY; capture-to-queryable latency
	@$(PY) -m benchmarks.ingest $(ARGS)

bench-forwarder: setup ## The forwarder to Kafka: drain rate, and what it costs inside the proxy
	@$(PY) scripts/kafka.py fetch
	@$(PY) -m benchmarks.forwarder $(ARGS)

bench-outage: setup ## Proxied traffic while Kafka is frozen against the same while it answers
	@$(PY) scripts/kafka.py fetch
	@$(PY) -m benchmarks.outage $(ARGS)

bench-journal: setup ## The journal against sqlite and buffered files
	@$(PY) -m benchmarks.journal $(ARGS)

bench-logs: setup ## The two layouts of the log files, side by side
	@$(PY) -m benchmarks.logs $(ARGS)

bench-query: setup ## A million flows searched: pages, substrings, bodies, counts, statistics (ARGS="--plans" writes the plans)
	@$(PY) -m benchmarks.query $(ARGS)

lock: setup ## Resolve requirements.lock again (hashes, no host names)
	@.venv/bin/uv pip compile pyproject.toml -q --python $(PY) --all-extras --group dev --universal --generate-hashes \
		--custom-compile-command "make lock" -o requirements.lock

clean: ## Remove what set-up and tests made (not the history in .megido)
	@rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
