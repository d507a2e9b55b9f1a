# The commands of a contributor. Each target installs what it needs first, so `make demo` works on a fresh clone.
# Behind a private certificate authority: `export UV_SYSTEM_CERTS=1` (uv then uses the system's certificates).

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu gpu chaos chaos-kind fuzz audit lint format docs bench images kind-up kind-down submit-pipeline pull e2e chart clean

PYTHON ?= python3
DEMO   ?= demo
ARGS   ?=
SEED   ?= 1
KILLS  ?= 200

# Variables of the images, for a registry, a proxy or a private authority: images/README.md.
ENGINE          ?= $(notdir $(firstword $(foreach engine,docker podman buildah,$(shell command -v $(engine)))))
REGISTRY        ?= localhost
VERSION         := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' jobs/llamarefine_jobs/contract/version.py)
TAG             ?= $(VERSION)
GIT_COMMIT      ?= $(shell git rev-parse HEAD 2>/dev/null)
CA_CERTIFICATES ?= $(wildcard /usr/local/share/ca-certificates/*.crt)
IMAGES          ?= $(patsubst images/%/Dockerfile,%,$(wildcard images/*/Dockerfile))
export ENGINE REGISTRY VERSION TAG GIT_COMMIT CA_CERTIFICATES IMAGES

# Variables of the cluster on this machine, and of what is submitted to the current cluster: k8s/README.md.
CLUSTER         ?= llamarefine
NAMESPACE       ?= llamarefine
GPUS            ?= 0
IMAGE_LOADER    ?= kind
RECIPE          ?= jobs/recipes/demo.yaml
MODEL           ?= model
export CLUSTER NAMESPACE GPUS IMAGE_LOADER RECIPE
ON_CLUSTER       = k8s/with-bucket llamarefine

# The uv on the PATH if it runs, else our own in .uv/.
UV    := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
RUN   := $(UV) run --no-sync
READY := .venv/.ready

FIND_PYTHON = for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && break; python=; done; \
	[ -n "$$python" ] || { echo "make: expected Python 3.11 to 3.14, found $$($(PYTHON) --version 2>&1 | head -n 1);" \
	"install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv (with uv, which is installed into .uv if it is missing)

# The demo's quality gate holds for the demo's own pairs only, so it is removed when other PREFERENCES are given.
demo: $(READY) ## run the whole pipeline on this machine, in minutes; CSV=rows.csv PREFERENCES=pairs.jsonl ARGS="--set …"
	@.venv/bin/llamarefine run jobs/recipes/demo.yaml --store "$(DEMO)/store" --into "$(DEMO)" \
		$(if $(CSV),--set "prepare.questions.source=$(CSV)") \
		$(if $(PREFERENCES),--set "prepare.preferences.source=$(PREFERENCES)" --set "evaluate.gates=[]") $(ARGS)

test: $(READY) ## run every test that this machine can run; ARGS="-k sft -x" goes to pytest
	$(RUN) pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-gpu: $(READY) ## test the training contract on a CUDA device, with each backend that is installed; skips without a device
	LLAMAREFINE_GPU_BACKEND=packed $(RUN) pytest tests/gpu $(ARGS)
	LLAMAREFINE_GPU_BACKEND=transformers $(RUN) pytest tests/gpu $(ARGS)
	@if $(RUN) python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("unsloth") is None)'; \
	then LLAMAREFINE_GPU_BACKEND=unsloth $(RUN) pytest tests/gpu $(ARGS); \
	else echo "make: unsloth is not installed (uv sync --locked --extra gpu), so its backend was not tested"; fi

gpu: $(READY) ## on a GPU, in 8 minutes: install its extra, test, benchmark, the most valuable first; results in gpu-results/
	@tests/gpu/run card
	$(UV) sync --locked --inexact --extra train --extra gpu
	@tests/gpu/run

chaos: $(READY) ## kill, fill up and damage real runs at random moments: SEED=1 KILLS=200; docs/chaos.md
	$(RUN) python -m tests.chaos --seed "$(SEED)" --kills "$(KILLS)" $(ARGS)

chaos-kind: $(READY) ## delete, evict and cut off runs on a kind cluster in every phase: SEED=1 ARGS="--only evict"; docs/chaos.md
	$(RUN) python -m tests.chaos.on_kind --seed "$(SEED)" $(ARGS)

INPUTS ?= 100000
fuzz: $(READY) ## give every reader of foreign bytes INPUTS=100000 malformed inputs, the same each time; takes a while
	LLAMAREFINE_FUZZ=$(INPUTS) $(RUN) pytest -n auto --maxprocesses 4 tests/fuzz $(ARGS)

audit: $(READY) ## look up known vulnerabilities of the locked packages; asks a service on the internet
	@$(UV) export --quiet --locked --all-extras --no-emit-project >"$(READY).audit"
	@$(UV) tool run pip-audit --disable-pip --no-deps --requirement "$(READY).audit"

lint: $(READY) ## check style, types, security rules and import rules; changes nothing
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports --no-logo

format: $(READY) ## format the code with ruff
	$(RUN) ruff check --fix
	$(RUN) ruff format

docs: $(READY) ## write what is generated from the code: docs/cli.md, tables in the READMEs, JSON schemas
	@$(RUN) python -m tests.repo.generated

bench: $(READY) ## run the benchmarks of tests/bench; they print durations, and assert none
	@for script in tests/bench/*.py; do PYTHONPATH=. $(RUN) python "$$script" || exit; done

.PHONY: $(IMAGES:%=image-%)

images: ## build every container image with docker, podman or buildah; `make image-sft` builds one
	@images/build $(IMAGES)

$(IMAGES:%=image-%): image-%:
	@images/build $*

kind-up: ## create a cluster on this machine with images, MinIO and the chart, or update it; GPUS=2 advertises two GPUs
	@EXTRA=$(or $(EXTRA),train) k8s/kind-up

kind-down: ## remove that cluster
	@k8s/kind-down

submit-pipeline: $(READY) ## run a recipe on the current cluster: RECIPE=my.yaml ARGS="--set sft.epochs=2"
	@$(ON_CLUSTER) submit "$(RECIPE)" $(ARGS)

pull: $(READY) ## download the newest run's merged model from the current cluster's bucket into MODEL=model
	@$(ON_CLUSTER) pull --into "$(MODEL)" $(ARGS)

e2e: $(READY) ## test the pipeline on kind in real containers; takes minutes and gigabytes
	LLAMAREFINE_E2E=1 $(RUN) pytest tests/images tests/k8s/cluster/test_*on_kind.py tests/chart/test_on_kind.py tests/e2e/test_kind.py $(ARGS)

chart: ## check the Helm chart and package it into dist/
	@helm lint --strict charts/llamarefine --set minio.enabled=true
	@helm package charts/llamarefine --destination dist

clean: ## remove what the targets above created: environment, caches, the demo with its models
	rm -rf .venv .uv .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist gpu-results "$(DEMO)"

# Other installed packages, such as those of the extra `gpu`, stay (--inexact).
$(READY): pyproject.toml uv.lock $(filter .uv/%,$(UV))
	@$(FIND_PYTHON)
	$(UV) sync --locked --inexact --extra train $(if $(filter command environment,$(origin PYTHON)),--python "$(PYTHON)")
	@touch $@

.uv/bin/uv:
	@$(FIND_PYTHON); \
	{ "$$python" -m venv .uv && .uv/bin/python -m pip install --quiet uv; } || \
	"$$python" -m pip install --quiet --target .uv uv || \
	{ rm -rf .uv; echo "make: uv could not be installed; install python3-venv, or uv itself (https://docs.astral.sh/uv/)" >&2; exit 1; }
