# make demo | make test | make quality | make style: each creates .venv and installs what it needs on first use.
# make test-adapters: do LoRA files load in the newest, the oldest and older versions, whoever wrote them?
# make test-oldest: the tests on the lower bounds of setup.cfg, in .venv-oldest; TESTS='-m "not slow"' chooses some.
# make docs: the site, in build/docs.
# make dist REPOSITORY=https://github.com/OWNER/NAME: source distribution and wheel, checked; needs a network.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/.installed
PATHS = *.py benchmarks research sketch_perceptual tests tools
TESTS =

.PHONY: demo docs test test-oldest test-adapters quality style dist

.venv-oldest/.installed: ONLY = -c .venv-oldest/lower-bounds.txt
.venv/.installed .venv-oldest/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(@D)
	sed -n 's/^ *\([A-Za-z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg > $(@D)/lower-bounds.txt
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -e '.[test]' $(ONLY)
	touch $@

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TESTS)

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 $(TESTS)

test-adapters: $(INSTALLED) .venv-oldest/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/adapter_matrix.py

quality: $(INSTALLED)
	$(BIN)/ruff check $(PATHS)
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix $(PATHS)
	$(BIN)/ruff format $(PATHS)

dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	REPOSITORY=$(REPOSITORY) $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

docs: .venv/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/docs
	@echo build/docs/index.html

TINY_SD = sketch_perceptual/assets/tiny-sd
DEMO_PROMPTS = $(foreach thing,a_house a_cat a_boat a_flower an_umbrella a_snail,"a sketch of $(subst _, ,$(thing))")
demo: $(INSTALLED)
	rm -rf demo/lora demo/generated
	$(BIN)/python -m sketch_perceptual.drawings --output_dir demo/drawings --per_class 12 --size 128
	HF_HUB_OFFLINE=1 $(BIN)/python train_lora_sketch.py --pretrained_model_name_or_path $(TINY_SD) \
	  --train_data_dir demo/drawings --resolution 128 --noise_offset 0.3 --rank 32 \
	  --learning_rate 2e-3 --train_batch_size 4 --max_train_steps 120 --seed 42 \
	  --validation_prompt $(DEMO_PROMPTS) --num_validation_images 2 --validation_epochs 100 --output_dir demo/lora
	HF_HUB_OFFLINE=1 $(BIN)/sketch-perceptual evaluate generation --train_data_dir demo/drawings \
	  --pretrained_model_name_or_path $(TINY_SD) --resolution 128 --models before=none after=demo/lora \
	  --num_images 16 --generation_batch_size 16 --output_dir demo/generated --output demo/scores.json \
	  --figure demo/scores.png
