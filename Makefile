# Two commands do everything on a machine that has only Python (3.11 to 3.13) and make:
#   make run    install, start, answer one chat request, keep serving
#   make test   install, run every test that needs no GPU
#
# Without a GPU, let pip take PyTorch's CPU wheels: put their index (see pytorch.org, "CPU") into PIP_EXTRA,
#   make run PIP_EXTRA="--extra-index-url URL"

PYTHON ?= python3
PIP_EXTRA ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_EXTRA)
PORT ?= 8000
JOBS ?= $(shell nproc)
NODES ?= 5
RATE ?= 1gbit
DELAY ?= 0.2ms
MINUTES ?= 5
SEED ?= 1
POLICY ?= on_demand
PROMPT ?= Elizabeth looked at Mr. Darcy and

.PHONY: run test check bench soak chaos fuzz audit testbed test-testbed follow-docs lint types imports unit test-browser \
	manifests docs clean

# torch first and alone: with a CPU build installed, nothing later asks for the CUDA one
$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e ".[dev,bench]"
	touch $@

run: $(VENV)/.base
	$(BIN)/raymoe serve deployments/local.yaml --port $(PORT) --chat "$(PROMPT)"

# tests of whole clusters: two files at a time, for each has several processes
test: unit
	$(BIN)/python -m pytest tests/integration -n 2 --dist loadfile

check: lint types imports unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit -n $(JOBS) --dist worksteal

# the page in a headless Chromium; Debian's is installed where there is none (CHROMIUM names another)
test-browser: $(VENV)/.dev
	test -n "$$CHROMIUM" || command -v chromium || (apt-get update && apt-get install -y chromium)
	$(BIN)/python -m pytest tests/browser

# renders k8s/ and holds it against the schemas in KUBERAY_CRDS, a directory with KubeRay's CustomResourceDefinitions
manifests: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit/test_manifests.py tests/unit/test_images.py -rs

# the documentation as a site, in out/site
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.decode --quick --json out/decode.json
	$(BIN)/python -m benchmarks.micro --quick --json out/micro.json
	$(BIN)/python -m benchmarks.importance --quick --json out/importance.json
	$(BIN)/python -m benchmarks.predictor --quick --json out/predictor.json
	$(BIN)/python -m benchmarks.on_demand --quick --json out/on-demand.json
	$(BIN)/python -m benchmarks.joint --quick --json out/joint.json
	$(BIN)/python -m benchmarks.serve --quick --json out/serve.json
	$(BIN)/python -m benchmarks.observe --quick --json out/observe.json
	$(BIN)/python -m benchmarks.planning out/on-demand.json --json out/planning.json
	$(BIN)/python -m benchmarks.simulation --quick --measured out/on-demand.json --json out/simulation.json

# 500 requests of every kind over ten minutes against a real server; every good answer is checked, nothing may be left
soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak

# 200 faults in 20 minutes upon a real cluster; SEED and POLICY choose others, CHAOS takes further options
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos --seed $(SEED) --policy $(POLICY) --json out/chaos.json $(CHAOS)

# the parsers of the data plane, guided by coverage (skipped where atheris has no wheel), and a million mutated messages
fuzz: $(VENV)/.dev
	$(PIP) -e ".[fuzz]" || echo "atheris can't be installed here"
	$(BIN)/python -m tests.fuzz.guided --minutes $(MINUTES)
	$(BIN)/python -m tests.fuzz.million --json out/fuzz/million.json

# known vulnerabilities of what is installed; skipped, and says so, where no vulnerability service can be reached
audit: $(VENV)/.dev
	$(PIP) -e ".[audit]" || echo "pip-audit can't be installed here"
	$(BIN)/python -m tests.audit

# decoding over NODES hosts on an emulated network, against loopback; as root, for hosts are network namespaces
testbed: $(VENV)/.dev
	$(BIN)/python -m benchmarks.testbed --nodes $(NODES) --rate $(RATE) --delay $(DELAY) --json out/testbed.json

# the tests on such hosts; skipped, with the reason, where there can be none
test-testbed: $(VENV)/.dev
	$(BIN)/python -m pytest tests/testbed -n 0 -rs

# what docs/edge.md says for two boxes, word for word, on two such hosts
follow-docs: $(VENV)/.dev
	$(BIN)/python -m tests.testbed.follow_docs

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
