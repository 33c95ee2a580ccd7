"""Continue prompts with a trained model.

    python tools/generate_text.py --load checkpoints --prompt "The import statement" --max-new-tokens 64
    torchrun --nproc-per-node 2 tools/generate_text.py --load checkpoints --prompt "..."   # TP 2

The model's shape and tokenizer come from the checkpoint; it may have been trained on any layout.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command

if TYPE_CHECKING:
    from megatron_ext.inference import Sampling
    from megatron_ext.models.gpt_model import PanguModel
    from megatron_ext.tokenizer import Tokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("--load", required=True, help="checkpoint folder, as given to --save")
    parser.add_argument("--ckpt-step", type=int, help="iteration to load (default: the newest)")
    parser.add_argument("--tokenizer-model", help="tokenizer file or folder, if it moved or is not there")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow a Hugging Face tokenizer to run Python code of its folder",
    )
    parser.add_argument(
        "--prompt", action="append", help="text to continue; may be repeated (default: stdin)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest continuation (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="keep this much probability (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the draws (default: 1234)")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after the end of the document")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all continuations")
    return parser


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, it is {options.max_new_tokens}")
    prompts = read_prompts(options.prompt)

    from megatron_ext import platform

    platform.activate(options.device)
    from megatron_ext.inference import Sampling, load_for_inference
    from megatron_ext.platform.collective import is_last_rank
    from megatron_ext.training import distributed

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer, _ = load_for_inference(
        options.load, options.ckpt_step, options.tokenizer_model, options.trust_remote_code
    )
    stop = None if options.ignore_eod else tokenizer.eod
    results = [
        continuation(model, tokenizer, prompt, options.max_new_tokens, sampling, stop) for prompt in prompts
    ]
    if is_last_rank():
        show(results, options.json)
    distributed.finalize()
    return 0


def read_prompts(given: list[str] | None) -> list[str]:
    """The prompts of the command line, else standard input; raises ValueError if one is not UTF-8."""
    if given is None and sys.stdin is None:
        raise ValueError("standard input is closed; give --prompt")
    try:
        prompts = [sys.stdin.read()] if given is None else given
        for prompt in prompts:
            prompt.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {error}") from None
    return prompts


def continuation(
    model: "PanguModel",
    tokenizer: "Tokenizer",
    prompt: str,
    longest: int,
    sampling: "Sampling",
    stop: int | None,
) -> dict[str, Any]:
    from megatron_ext.inference import generate

    start = time.perf_counter()
    ids = tokenizer.tokenize(prompt)
    new = list(generate(model, ids, longest, sampling, tokenizer.vocab_size, stop))
    seconds = time.perf_counter() - start
    text = tokenizer.detokenize(ids + [token for token in new if token != stop])
    return {"prompt": prompt, "text": text, "new_tokens": len(new), "tokens_per_second": len(new) / seconds}


def show(results: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"results": results}, ensure_ascii=False))
        return
    for result in results:
        print(result["text"])
        print(
            f"--- {result['new_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s", file=sys.stderr
        )


if __name__ == "__main__":
    sys.exit(main())
