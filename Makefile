# `make help` lists what there is. PYTHON chooses the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python
.DEFAULT_GOAL := help
.PHONY: help install constraints lint format test test-lowest test-newest slurm gpu docs run cost wheel ci clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Install the package, editable, with what development needs, in the tested versions
	$(PYTHON) -m pip install -e ".[dev]" -c constraints.txt

constraints: ## Write the versions installed in a fresh environment of the newest ones to constraints.txt
	$(PYTHON) -m venv build/newest && build/newest/bin/pip install --quiet -e ".[dev]"
	head -2 constraints.txt > build/constraints.txt
	build/newest/bin/pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

lint: ## Check style, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

format: ## Put the code into shape
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test: ## Run the tests
	$(PYTHON) -m pytest

test-lowest: ## All that has to pass, with the lowest versions that pyproject.toml allows
	bash .ci/run lowest

test-newest: ## All that has to pass, with the newest versions
	bash .ci/run newest

slurm: ## Experiments under a Slurm of this machine, as root: apt-get install slurm-wlm munge
	bash tests/slurm/cluster.sh $(PYTHON) tests/slurm/check.py

gpu: ## All that needs a GPU, in at most eight minutes; DEVICE=cpu is the rehearsal
	$(PYTHON) tests/gpu/run.py device=$(or $(DEVICE),cuda)

docs: ## Build the documentation into docs/_build, warnings as errors
	$(PYTHON) -m sphinx -W -b html docs docs/_build

run: ## The main job: the group-size ablation, offline, in minutes
	$(PYTHON) -m ivtp.run experiment=ablation_groupsize

cost: ## What pruning saves on LLaVA-1.5-7B, from its sizes alone
	$(PYTHON) -m ivtp.cost model=llava_1_5_7b pruner=ivtp text=512

wheel: ## Build the source archive and the wheel into dist/
	$(PYTHON) -m build

ci: ## All that has to pass, in a fresh virtual environment
	bash .ci/run

clean: ## Remove what was built and cached; outputs/ stays
	rm -rf build dist docs/_build docs/experiments docs/jupyter_execute docs/notebooks .pytest_cache .ruff_cache .hypothesis .ci/venv
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +
