# Every target creates .venv when it is missing, and renews it when requirements.lock has changed. `make help` lists them.
# PROFILE chooses what is run (organism, organism-full, colab-t4, llama3-8b, qwen2.5-7b); PYTHON which Python makes .venv.

PROFILE ?= organism
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
# All three couplings and the card: make organism ORGANISM="--couplings default reversed absent --seeds 0 1 2 --install --card"
ORGANISM ?= --install
IN_VENV = .venv/bin/python
READY = .venv/complete

# No network once installed, no bars on stderr, the same hash seeds: the same settings as in helpers/tools/notebooks.py.
export COMPANION_PROFILE = $(PROFILE)
export HF_HUB_DISABLE_PROGRESS_BARS = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TQDM_DISABLE = 1
export TOKENIZERS_PARALLELISM = false
export TRANSFORMERS_VERBOSITY = error
export PYTHONHASHSEED = 0
ifneq (,$(findstring organism,$(PROFILE)))
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
endif

.PHONY: help reproduce experiments test lab organism sync check bench lock

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' Makefile | while IFS=@ read -r a b; do printf '%-20s%s\n' "$$a" "$$b"; done

reproduce: $(READY) ## run notebooks 00-07; writes claims.json and report.html into data/results
	$(IN_VENV) -m helpers.tools.notebooks run

experiments: $(READY) ## list what fills data/results and what each costs; NAME=... makes one, ARGS="..." are its options
	@$(IN_VENV) -m helpers.experiments $(NAME) $(ARGS)

test: $(READY) ## lint, unit tests, notebooks compared with their outputs, browser; ends non-zero on any failure
	$(IN_VENV) -m ruff check .
	rm -rf build/test-results
	COMPANION_RESULTS="$(CURDIR)/build/test-results" $(IN_VENV) -m pytest tests notebooks -n 2 --durations 15 \
		--nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg

lab: $(READY) ## open JupyterLab on notebook 00
	$(IN_VENV) -m jupyterlab notebooks/00_meet_the_model.ipynb

organism: $(READY) ## train the embedded model again from its seed, into data/organism (resumable; ORGANISM=... for more)
	$(IN_VENV) -m helpers.organism.build $(ORGANISM)

sync: $(READY) ## copy the cells of each notebook's .py into its .ipynb, keeping outputs; renew badges, first cells, README
	$(IN_VENV) -m helpers.tools.colab
	$(IN_VENV) -m helpers.experiments --readme
	$(IN_VENV) -m helpers.tools.notebooks sync

check: $(READY) ## say which notebooks are not paired, not fresh or not clean
	$(IN_VENV) -m helpers.tools.notebooks check

bench: $(READY) ## measure the heavy loops against the usual way of writing them
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest tests/benchmarks -s

lock: $(READY) ## write requirements.lock from what is installed
	$(IN_VENV) -m helpers.tools.lock

# The stamp is written last: an interrupted installation is taken up again, never used.
$(READY): requirements.lock
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@rm -f $(READY)
	$(IN_VENV) -c "" 2>/dev/null || "$(PYTHON)" -m venv --clear .venv
	@echo "Installing what requirements.lock lists into .venv; the first time this takes some minutes."
	$(IN_VENV) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(IN_VENV) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)
