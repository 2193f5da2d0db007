# Each recipe is one line that also works when typed. Variables given to make (`make demo YES=1`) reach the program.
.DEFAULT_GOAL := help
.PHONY: help install demo demo-crash demo-regions test test-s3 test-sql test-k8s chaos bench lint style types layers api generated format protos clean

# The first of these that is Python 3.11 or newer; or choose: make PYTHON=/path/to/python3.12 …
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Three modules of tests at once, each in a process and on a database server of its own; WORKERS= runs one after another.
# Mostly they wait, so three keep two cores busy. In the order that is given: folders with the longest modules first, so
# that no worker is left with one at the end.
WORKERS ?= -n 3 --dist loadfile --no-loadscope-reorder
# Every worker, and every server of a test, imports the same modules: compiled once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE =
# What `make api` compares the API with, when it exists.
BASE ?= origin/main
PROTOC = PATH=".venv/bin:$$PATH" .venv/bin/python -m grpc_tools.protoc -I protos -I protos/third_party

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

# Made once, and again when one of the two files changes; with no network everything else works on.
.venv/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; install it, or say make PYTHON=/path/to/python))$(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1' && .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[service,embedded,agents,cli,s3]' --group dev && touch $@

install: .venv/installed  ## Make .venv and install everything into it

demo: .venv/installed  ## Run the research agent on documents, live (YES=1 asks nothing; DOCS=folder QUESTION='…')
	.venv/bin/python -m perdure_client.demo

demo-crash: .venv/installed  ## Kill a server in the middle of a run, and watch another one finish it
	.venv/bin/python -m perdure_client.demo_crash

demo-regions: .venv/installed  ## Lose a region: kill its servers, watch another region go on, and give it back
	.venv/bin/python -m perdure_client.demo_regions

test: .venv/installed  ## Run all tests on a real database (embedded, or PERDURE_TEST_DATABASE_URL)
	.venv/bin/python -m pytest $(WORKERS) tests/chaos tests/e2e tests/integration tests/unit

chaos: .venv/installed  ## Run the chaos tests at every point there is, and sum up what was broken and found
	PERDURE_TEST_ALL_POINTS=1 .venv/bin/python -m pytest $(WORKERS) tests/chaos

bench: .venv/installed  ## Measure, about half an hour (BENCH='throughput --secs 3', --help; --write puts the tables into the documents)
	.venv/bin/python -m tests.load $(BENCH)

# A Go program, built once into the user's cache; PERDURE_TEST_S3_SERVER is another one that takes its arguments.
S3_FOLDER ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/perdure/bin
PERDURE_TEST_S3_SERVER ?= $(S3_FOLDER)/versitygw

test-s3: .venv/installed  ## Run the tests that need a real S3-compatible server (versitygw, built with Go once)
	test -x "$(PERDURE_TEST_S3_SERVER)" || { command -v go >/dev/null || { echo "make test-s3 needs Go 1.24 or newer to build versitygw, or PERDURE_TEST_S3_SERVER=/path/to/versitygw" >&2; exit 1; }; GOBIN="$(S3_FOLDER)" go install github.com/versity/versitygw/cmd/versitygw@v1.8.0; } && PERDURE_TEST_S3_SERVER="$(PERDURE_TEST_S3_SERVER)" .venv/bin/python -m pytest tests/s3

# What the tests of the server send over CockroachDB's dialect (to PostgreSQL) is recorded, then parsed.
SQL_TESTS ?= tests/integration

test-sql: .venv/installed  ## Run the tests that parse every SQL statement with CockroachDB's grammar (built with Go once)
	.venv/bin/python -m tests.helpers.go_programs tests/sql/grammar && d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && export PERDURE_TEST_RECORDED_SQL="$$d/statements" && PERDURE_TEST_DATABASE_FORM=cockroachdb+psycopg .venv/bin/python -m pytest $(WORKERS) $(SQL_TESTS) && .venv/bin/python -m pytest tests/sql

test-k8s: .venv/installed  ## Apply every overlay of k8s/ to a real kube-apiserver (built with Go once, some minutes)
	.venv/bin/python -m tests.helpers.go_programs tests/k8s/control_plane/etcd tests/k8s/control_plane/kube-apiserver && .venv/bin/python -m pytest tests/k8s

lint: style types layers api generated  ## Check style, types, layers, the API, and that generated code is current

style: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

types: .venv/installed
	.venv/bin/mypy && .venv/bin/mypy service/docs/examples/refunds && .venv/bin/pyright

layers: .venv/installed
	.venv/bin/lint-imports

api: .venv/installed
	.venv/bin/buf lint protos && if git cat-file -e $(BASE):protos/buf.yaml 2>/dev/null; then .venv/bin/buf breaking protos --against ".git#ref=$$(git rev-parse $(BASE)),subdir=protos"; fi

generated: .venv/installed
	.venv/bin/python clients/python/make_sync_client.py --check && d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && $(PROTOC) --python_out="$$d" --grpc_python_out="$$d" --mypy_out=quiet:"$$d" --mypy_grpc_out=quiet,only_async:"$$d" protos/perdure/v1/*.proto && diff -r -x '*.proto' -x __init__.py -x py.typed -x __pycache__ "$$d/perdure" protos/perdure

format: .venv/installed  ## Format the code and sort its imports
	.venv/bin/ruff check --fix --select I . && .venv/bin/ruff format .

protos: .venv/installed  ## Generate the Python code of protos/ and the blocking client, to be committed
	$(PROTOC) --python_out=protos --grpc_python_out=protos --mypy_out=quiet:protos --mypy_grpc_out=quiet,only_async:protos protos/perdure/v1/*.proto && .venv/bin/python clients/python/make_sync_client.py

clean:  ## Remove everything that make and the tools made, .venv too
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache && find . -name __pycache__ -prune -exec rm -rf {} +
