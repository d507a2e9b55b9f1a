# Everything a contributor types. Each target makes what it needs first, so `make demo` works on a fresh clone.
# Behind a private certificate authority: `export UV_SYSTEM_CERTS=1` (uv then trusts what the system trusts).

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu gpu chaos chaos-kind fuzz audit lint format docs bench images kind-up kind-down submit-pipeline pull e2e chart clean

PYTHON ?= python3
DEMO   ?= demo
ARGS   ?=
SEED   ?= 1
KILLS  ?= 200

# Images, and what a registry, a proxy or a private authority changes about them: images/README.md.
ENGINE          ?= $(notdir $(firstword $(foreach engine,docker podman buildah,$(shell command -v $(engine)))))
REGISTRY        ?= localhost
VERSION         := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' jobs/llamarefine_jobs/contract/version.py)
TAG             ?= $(VERSION)
GIT_COMMIT      ?= $(shell git rev-parse HEAD 2>/dev/null)
CA_CERTIFICATES ?= $(wildcard /usr/local/share/ca-certificates/*.crt)
IMAGES          ?= $(patsubst images/%/Dockerfile,%,$(wildcard images/*/Dockerfile))
export ENGINE REGISTRY VERSION TAG GIT_COMMIT CA_CERTIFICATES IMAGES

# The cluster on this machine, and what is submitted to the current one: k8s/README.md.
CLUSTER         ?= llamarefine
NAMESPACE       ?= llamarefine
GPUS            ?= 0
IMAGE_LOADER    ?= kind
RECIPE          ?= jobs/recipes/demo.yaml
MODEL           ?= model
export CLUSTER NAMESPACE GPUS IMAGE_LOADER RECIPE
ON_CLUSTER       = k8s/with-bucket llamarefine

# The uv on the PATH where one runs, else one of our own in .uv/.
UV    := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
RUN   := $(UV) run --no-sync
READY := .venv/.ready

FIND_PYTHON = for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && break; python=; done; \
	[ -n "$$python" ] || { echo "make: expected Python 3.11 to 3.14, found $$($(PYTHON) --version 2>&1 | head -n 1);" \
	"install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv (with uv, which is fetched into .uv where missing)

# The demo's gate is a bound for the demo's own pairs; what others do to so small a model is theirs to judge.
demo: $(READY) ## the whole pipeline on this machine, in minutes; CSV=rows.csv PREFERENCES=pairs.jsonl ARGS="--set …"
	@.venv/bin/llamarefine run jobs/recipes/demo.yaml --store "$(DEMO)/store" --into "$(DEMO)" \
		$(if $(CSV),--set "prepare.questions.source=$(CSV)") \
		$(if $(PREFERENCES),--set "prepare.preferences.source=$(PREFERENCES)" --set "evaluate.gates=[]") $(ARGS)

test: $(READY) ## run every test that this machine can; ARGS="-k sft -x" goes to pytest
	$(RUN) pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-gpu: $(READY) ## the training contract on a CUDA device, on both backends where Unsloth is there; skips without one
	LLAMAREFINE_BACKEND=transformers $(RUN) pytest tests/gpu $(ARGS)
	@if $(RUN) python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("unsloth") is None)'; \
	then LLAMAREFINE_BACKEND=unsloth $(RUN) pytest tests/gpu $(ARGS); \
	else echo "make: unsloth is not installed (uv sync --locked --extra gpu), so its backend was not tested"; fi

gpu: $(READY) ## all that a GPU is wanted for: the contract on both backends, then the benchmark; results in gpu-results/
	@tests/gpu/run card
	$(UV) sync --locked --inexact --extra train --extra gpu
	@tests/gpu/run

chaos: $(READY) ## kill, fill up and damage real runs at random moments: SEED=1 KILLS=200; docs/chaos.md
	$(RUN) python -m tests.chaos --seed "$(SEED)" --kills "$(KILLS)" $(ARGS)

chaos-kind: $(READY) ## delete, evict and starve runs on a kind cluster in every phase: SEED=1 ARGS="--only evict"; docs/chaos.md
	$(RUN) python -m tests.chaos.on_kind --seed "$(SEED)" $(ARGS)

INPUTS ?= 100000
fuzz: $(READY) ## give what reads foreign bytes INPUTS=100000 wrong ones, the same each time; takes a while
	LLAMAREFINE_FUZZ=$(INPUTS) $(RUN) pytest -n auto --maxprocesses 4 tests/fuzz $(ARGS)

audit: $(READY) ## look up the known vulnerabilities of all that is locked; asks a service on the internet
	@$(UV) export --quiet --locked --all-extras --no-emit-project >"$(READY).audit"
	@$(UV) tool run pip-audit --disable-pip --no-deps --requirement "$(READY).audit"

lint: $(READY) ## check style, types, security rules and who imports whom; changes nothing
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports --no-logo

format: $(READY) ## let ruff write the code's style
	$(RUN) ruff check --fix
	$(RUN) ruff format

docs: $(READY) ## write docs/cli.md and the recipe's schema from the code
	@$(RUN) python -m tests.repo.generated

bench: $(READY) ## measure what is worth watching (times never pass or fail a test)
	@for script in tests/bench/*.py; do PYTHONPATH=. $(RUN) python "$$script" || exit; done

.PHONY: $(IMAGES:%=image-%)

images: ## build every container image with docker, podman or buildah; `make image-sft` builds one
	@images/build $(IMAGES)

$(IMAGES:%=image-%): image-%:
	@images/build $*

kind-up: ## a cluster on this machine with images, MinIO and the chart; GPUS=2 advertises two; run it again after a change
	@EXTRA=$(or $(EXTRA),train) k8s/kind-up

kind-down: ## remove that cluster
	@k8s/kind-down

submit-pipeline: $(READY) ## run a recipe on the current cluster: RECIPE=my.yaml ARGS="--set sft.epochs=2"
	@$(ON_CLUSTER) submit "$(RECIPE)" $(ARGS)

pull: $(READY) ## bring the newest run's merged model from the current cluster's bucket into MODEL=model
	@$(ON_CLUSTER) pull --into "$(MODEL)" $(ARGS)

e2e: $(READY) ## prove the pipeline on kind, real containers and all; takes minutes and gigabytes
	LLAMAREFINE_E2E=1 $(RUN) pytest tests/images tests/k8s/cluster/test_*on_kind.py tests/chart/test_on_kind.py tests/e2e/test_kind.py $(ARGS)

chart: ## check the Helm chart and pack it into dist/
	@helm lint --strict charts/llamarefine --set minio.enabled=true
	@helm package charts/llamarefine --destination dist

clean: ## remove what the targets above made: environment, caches, the demo with its models
	rm -rf .venv .uv .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist gpu-results "$(DEMO)"

# What else was installed, such as the extra `gpu`, stays.
$(READY): pyproject.toml uv.lock $(filter .uv/%,$(UV))
	@$(FIND_PYTHON)
	$(UV) sync --locked --inexact --extra train $(if $(filter command environment,$(origin PYTHON)),--python "$(PYTHON)")
	@touch $@

.uv/bin/uv:
	@$(FIND_PYTHON); \
	{ "$$python" -m venv .uv && .uv/bin/python -m pip install --quiet uv; } || \
	"$$python" -m pip install --quiet --target .uv uv || \
	{ rm -rf .uv; echo "make: uv could not be installed; install python3-venv, or uv itself (https://docs.astral.sh/uv/)" >&2; exit 1; }
