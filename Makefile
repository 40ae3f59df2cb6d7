# `make help` lists what there is to do. The environment, .venv, is made once, and again when its pins change.
BIN := $(CURDIR)/.venv/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
ENV := .venv/.stamp
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
TESTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHONS := python3 python3.12 python3.11
PYTHON ?= $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c "$(TESTED)" 2>/dev/null && echo $(p))) python3)

export PATH := $(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export WANDB_MODE ?= disabled
# nothing here downloads a model, except in the targets where you ask for one; HF_HUB_OFFLINE=0 lifts it
demo test slow test-tl4 test-saebench notebooks docs: export HF_HUB_OFFLINE ?= 1
# the embedded models are so small that a second thread gains nothing, and loses much when the core is wanted elsewhere
demo test slow test-tl4 notebooks bench: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test slow test-tl4 test-saebench export notebooks readme docs lab bench zoo wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

$(ENV): requirements-dev.txt setup.py settings.ini
	@"$(PYTHON)" -c "$(NEW_ENOUGH)" 2>/dev/null || { \
	  echo "sage_nb needs Python 3.11 or newer. Where is it? make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv: about 2.5 GB, a few minutes the first time"
	@test -x $(PY) || "$(PYTHON)" -m venv .venv
	@$(PIP) $$(grep '^torch==' requirements-dev.txt)
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(ENV) ## evaluate the embedded model and SAEs on IOI; writes demo/report.html
	@$(BIN)/sage_nb evaluate --model tiny-gpt2 --task ioi --saes tiny-gpt2-res-topk --n 384 --out demo --overwrite
	@echo "The report: $(CURDIR)/demo/report.html"

test: $(ENV) ## all checks, offline: export, README, docs, notebooks, pytest
	@printf '\n== modules are what the notebooks export ==\n'
	@$(PY) scripts/check_export.py
	@printf '\n== README.md is what nbs/index.ipynb says ==\n'
	@$(PY) scripts/readme.py --check
	@printf '\n== the doc site is rendered, where Quarto is ==\n'
	@$(PY) scripts/docs.py
	@printf '\n== notebooks run ==\n'
	@$(BIN)/nbdev_test --n_workers 2
	@printf '\n== tests/ ==\n'
	@$(PY) -m pytest -q -n 2 --dist loadfile --durations=40 --durations-min=4 tests

slow: $(ENV) ## what `make test` leaves out because it takes long: cells and tests flagged slow
	@printf '\n== notebooks run, with their slow cells ==\n'
	@$(BIN)/nbdev_test --flags slow --n_workers 2
	@printf '\n== slow tests ==\n'
	@$(PY) -m pytest -q -m "slow or ray" tests || [ $$? -eq 5 ]  # 5: no test is flagged slow; ray where it is installed

TL4 := .venv-tl4
test-tl4: $(ENV) ## tests with TransformerLens 4 and without sae_lens, in an environment of their own, .venv-tl4
	@test -x $(TL4)/bin/python || $(PY) -m venv $(TL4)
	@$(TL4)/bin/python -m pip install -qq --disable-pip-version-check $$(grep '^torch==' requirements-dev.txt)
	@sed -e 's/^transformer_lens==.*/transformer_lens==4.3.0/' -e '/^sae_lens==/d' requirements-dev.txt > $(TL4)/requirements.txt
	@$(TL4)/bin/python -m pip install -qq --disable-pip-version-check -r $(TL4)/requirements.txt
	@$(TL4)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(TL4)/bin/python -m pytest -q --noconftest tests/tl4

SAEBENCH := .saebench
test-saebench: $(ENV) ## SAEBench's own package reads what we write in its layout; installed beside, as it asks for an older numpy
	@test -d $(SAEBENCH)/sae_bench || $(PIP) --no-deps --target $(SAEBENCH) sae-bench==0.6.0 \
	  seaborn==0.13.2 plotly narwhals beartype tabulate
	@PYTHONPATH=$(SAEBENCH) $(PY) -c "import sae_bench.sae_bench_utils.graphing_utils"  # so that the test is not skipped
	@PYTHONPATH=$(SAEBENCH) $(PY) -m pytest -q tests/test_leaderboard.py -k own_package

export: $(ENV) ## write sage_nb/*/*.py from the notebooks, and clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

notebooks: $(ENV) ## run the notebooks and save their outputs (one: NB=nbs/1_core/12_activations.ipynb; FLAGS="slow gpu")
	@$(PY) scripts/run_notebooks.py --flags "$(FLAGS)" $(NB)

readme: $(ENV) ## write README.md from nbs/index.ipynb
	@$(PY) scripts/readme.py

docs: $(ENV) ## make the doc site; render it to _docs/ where Quarto is (PATH, ../shared/quarto, $$SAGE_NB_QUARTO)
	@$(PY) scripts/docs.py

lab: $(ENV) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

bench: $(ENV) ## run every benchmarks/*.py
	@for f in $(sort $(wildcard benchmarks/*.py)); do echo "== $$f"; $(PY) $$f || exit 1; done

zoo: $(ENV) ## train the embedded models and SAEs again, from nothing, into zoo/ (hours)
	@$(PY) -c "from sage_nb.lab.zoo import ZOO, make_zoo; [make_zoo(name) for name in ZOO]"

wheel: $(ENV) ## build the wheel and the source archive into dist/
	@rm -rf build dist
	@$(PY) -m build -qq --no-isolation . >/dev/null
	@ls -1 dist/*

clean: ## remove what the targets made, except .venv
	@rm -rf _docs _proc build dist demo .pytest_cache .hypothesis nbs/nbdev.yml
	@find nbs sage_nb tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
