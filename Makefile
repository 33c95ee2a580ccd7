# The commands of daily work; CI runs tests/run.sh.
.PHONY: setup style lint test test-gpu test-long smoke
BIN := .venv/bin

setup:
	bash tools/setup.sh

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test:
	bash tests/run.sh

# Minutes of work that CI leaves out: every document of the corpus, twenty kills, a gigabyte.
test-long: setup
	LONG_TESTS=1 $(BIN)/python -m pytest -s tests/unit/data/test_preprocess_long.py tests/unit/tokenizer/test_encoder.py

test-gpu: setup
	bash tests/gpu/run.sh

# The quickstart from corpus to sample, too short to learn much.
smoke: setup
	rm -rf runs/smoke
	QUICKSTART_DIR=runs/smoke QUICKSTART_ITERS=50 bash examples/quickstart.sh
