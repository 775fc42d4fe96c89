# make setup | demo | test | test-edge | test-tfx | bazel | clean
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := demo_out
# The cores decide how many tests run at once; more than a few would need much memory.
PYTEST := -m pytest -n auto --maxprocesses=4 --dist loadfile

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help setup demo test lint test-edge test-tfx bazel clean
.DELETE_ON_ERROR:

help:
	@echo "make setup      install tfopt and what its tests need into .venv"
	@echo "make demo       optimize the bundled digits model, print the table and the path of the report"
	@echo "make test       format, lint, types and tests"
	@echo "make test-edge  run the emitted .tflite files under tflite-runtime, without TensorFlow (.venv-edge)"
	@echo "make test-tfx   run the tests of TFX components, pipelines and Beam (.venv-tfx, 3.5 GB)"
	@echo "make bazel      build, and run one test, with the Bazel on the PATH"
	@echo "make clean      remove what these made, but for .venv, .venv-edge and .venv-tfx"

setup: .venv/.installed

.venv/.installed: setup.py pyproject.toml tools/make_venv.sh
	@PYTHON=$(PYTHON) tools/make_venv.sh .venv -e ".[test,keras2,serving]"
	@touch $@

.venv-edge/.installed: tools/make_venv.sh
	@PYTHON=$(PYTHON) tools/make_venv.sh .venv-edge "tflite-runtime==2.14.0" "numpy<2" "pytest>=8,<10"
	@touch $@

.venv-tfx/.installed: setup.py pyproject.toml tools/make_venv.sh tools/make_tfx_venv.sh $(wildcard tools/tfx/*)
	@PYTHON=$(PYTHON) tools/make_tfx_venv.sh .venv-tfx
	@touch $@

demo: setup
	@$(BIN)/python -m pipelines.train_digits --data_dir=$(DEMO)/data
	@$(BIN)/tfopt-optimize --model=saved_models/digits --output_dir=$(DEMO)/optimized --overwrite \
		--tflite=float32,float16,dynamic_int8,int8 --representative_data=$(DEMO)/data/representative.npz \
		--eval_data=$(DEMO)/data/eval.npz --metric=accuracy --max_accuracy_drop=0.01

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test: setup lint
	@$(BIN)/python $(PYTEST)

test-edge: setup .venv-edge/.installed
	@rm -rf build/edge
	@$(BIN)/python -m tests.edge.emit build/edge
	@.venv-edge/bin/python -m pytest tests/edge

test-tfx: .venv-tfx/.installed
	@.venv-tfx/bin/python $(PYTEST) tests/beam tests/tfx

bazel:
	@tools/check_build.sh

clean:
	rm -rf $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
