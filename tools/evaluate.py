#!/usr/bin/env python3
"""What a model knows: benchmarks, and bits per byte of text.

    python tools/evaluate.py --load checkpoints --tasks cmmlu c3 piqa --data-dir eval --output scores
    python tools/evaluate.py --load hf_folder --tasks mmlu_letters --num-fewshot 5 --data-dir eval --limit 200
    torchrun --nproc-per-node 4 tools/evaluate.py --load checkpoints --tensor-model-parallel-size 2 ...
    python tools/evaluate.py --load checkpoints --bits-per-byte valid_zh.jsonl.gz novel.txt
    python tools/evaluate.py --compare scores other_scores

Reads checkpoints of any layout, ours or Megatron-LM's, and Hugging Face folders. Benchmarks are cmmlu,
mmlu, agieval, piqa, eprstmt and c3 from local files; any other task of lm-evaluation-harness goes by its
name there.
docs/evaluation.md says what the numbers mean.

Exit code 0: all results are in place; 1: bad input; 2: bad usage.
"""

import json
import os
import sys
from pathlib import Path

if not sys.stderr.isatty():  # a log has no use for the harness's bars; read when tqdm is imported
    os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.harness.options import EvaluateOptions


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = command.parser(__doc__, options=EvaluateOptions)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    options, typed = command.read(parser, argv, EvaluateOptions)
    if options.compare:
        from megatron_ext.harness.compare import as_json, compare, told

        compared = compare(*options.compare)
        print(as_json(compared) if typed.json else told(compared))
        return 0
    from megatron_ext import platform

    platform.activate(options.device)
    from megatron_ext.harness import report, results
    from megatron_ext.harness.run import evaluate
    from megatron_ext.platform.collective import rank
    from megatron_ext.training import distributed

    try:
        found = evaluate(options, quiet=typed.json)
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command goes on where it was" if options.output else "") from None
    if rank() == 0:
        print(json.dumps(results.summary(found), ensure_ascii=False) if typed.json else report.table(found))
    distributed.finalize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
