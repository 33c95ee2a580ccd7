# The commands of daily work; CI runs tests/run.sh.
.PHONY: setup style lint test test-gpu test-long core-next smoke faults fuzz
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
	$(BIN)/mypy

test:
	bash tests/run.sh

# Minutes of work that CI leaves out: every document of the corpus, twenty kills, a gigabyte.
test-long: setup
	LONG_TESTS=1 $(BIN)/python -m pytest -s tests/unit/preprocess/test_preprocess_long.py tests/unit/tokenizer/test_encoder.py \
		tests/unit/inherit/test_memory.py tests/functional/test_examples.py tests/functional/test_evaluate.py

test-gpu: setup
	bash tests/gpu/run.sh

# The suites against Megatron-Core 0.19.2, in an environment of its own (Python 3.12, 6 GB): docs/engine.md.
core-next:
	bash tests/core_next.sh

# The quickstart from corpus to sample, too short to learn much.
smoke: setup
	rm -rf runs/smoke
	QUICKSTART_DIR=runs/smoke QUICKSTART_ITERS=50 bash examples/quickstart.sh

# The long forms of the fault injection and fuzz suites (docs/reliability.md).
faults: setup
	FAULT_KILLS=500 FAULT_STOPS=100 FAULT_DAMAGES=600 $(BIN)/python -m pytest -s tests/functional/faults

fuzz: setup
	FUZZ_CASES=1000000 $(BIN)/python -m pytest -s tests/fuzz
