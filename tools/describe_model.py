#!/usr/bin/env python3
"""Say how large a model is, how much work per token is, and what memory per device needs.

    python tools/describe_model.py --model-preset pangu-pi-1b-pro
    python tools/describe_model.py --model-preset 7b --tensor-model-parallel-size 2 --world-size 8 --bf16
    python tools/describe_model.py --design --params 1.0e9 --vocab-size 48000
    python tools/describe_model.py --design --params 1.0e9 --vocab-size 48000 --tokens 1.6e12

Shapes are given as for pretrain_pangu_pro.py: a preset, and flags that override it. Parameters are
exact; memory counts weights, gradients, optimizer state, and the activations that are kept. With --tokens
the design goes on to a training command: shape, batch, learning rate, warm-up, decay, each with its rule.
"""

import argparse
import dataclasses
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.arguments import defaults
from megatron_ext.arguments.parser import with_defaults
from megatron_ext.arguments.validate import numbers
from megatron_ext.common import command
from megatron_ext.common.flags import add_group, flag, wrong_fields
from megatron_ext.config import RunConfig, describe, flag_of, footprint, options
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.presets import PRESETS
from megatron_ext.planning import recipe

SHAPE_FLAGS = (
    *("model_preset", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "num_query_groups", "seq_length", "max_position_embeddings", "vocab_size"),
    *("make_vocab_size_divisible_by", "padded_vocab_size", "swiglu", "normalization", "add_bias_linear"),
    *("position_embedding_type", "untie_embeddings_and_output_weights", "series_activation_order"),
    *("augmented_shortcuts", "augmented_shortcut_reduction"),
)
LAYOUT_FLAGS = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"),
    *("use_distributed_optimizer", "recompute_granularity", "micro_batch_size", "global_batch_size", "bf16"),
)


@dataclasses.dataclass
class Options:
    """What this tool adds to the trainer's flags."""

    design: bool = flag(False, section="this tool")
    """List shapes of --params parameters."""

    params: float | None = flag(None, above=0)
    """Parameters for --design, such as 1.0e9."""

    tokens: float | None = flag(None, above=0)
    """Training tokens for --design, such as 1.6e12: prints the command as well."""

    world_size: int = flag(1, minimum=1)
    """Processes."""

    sustained_tflops: float = flag(100.0, above=0)
    """TFLOP/s of a device that training sustains, for tokens per second."""

    json: bool = False
    """Print one JSON object."""


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = make_parser()
    namespace = parser.parse_args(argv)
    tool = command.made(Options, namespace)
    typed = {name: value for name, value in vars(namespace).items() if name not in vars(tool)}
    problems: list[str] = []
    values = with_defaults(typed, problems)
    values |= {"device": "cpu", "micro_batch_size": values["micro_batch_size"] or 1}
    run = RunConfig.of(values)
    run.process.world_size = tool.world_size
    defaults.before_rules(run)
    problems += _problems(run, tool)
    if problems:
        parser.error("; ".join(problems))
    summary = design(run, tool, typed) if tool.design else description(run, tool)
    print(json.dumps(summary) if tool.json else "\n".join(_lines(summary)))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The shape and layout flags of the trainer, and what this tool adds."""
    usage = "%(prog)s --model-preset NAME [flags]  |  %(prog)s --design --params X --vocab-size N"
    parser = command.parser(__doc__, usage, Options)
    add_group(parser, "model, as for pretrain_pangu_pro.py", [options()[name] for name in SHAPE_FLAGS])
    add_group(parser, "layout, as for pretrain_pangu_pro.py", [options()[name] for name in LAYOUT_FLAGS])
    return parser


def _problems(run: RunConfig, tool: Options) -> list[str]:
    if wrong := [*wrong_fields(tool), *numbers.values_are_possible(run, {})]:
        return wrong
    if tool.tokens and not tool.design:
        return ["--tokens cannot take effect: needs --design"]
    if tool.design:
        return (
            [] if tool.params and run.tokenizer.vocab_size else ["--design needs --params and --vocab-size"]
        )
    if run.init.model_preset is not None and run.init.model_preset not in PRESETS:
        return []
    needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
    missing = ["--" + name.replace("_", "-") for name in needed if run.get(name) is None]
    if missing:
        return [f"give --model-preset, or {', '.join(missing)}"]
    if (run.init.model_preset, run.tokenizer.vocab_size, run.model.padded_vocab_size) == (None, None, None):
        return ["give --vocab-size"]
    if tool.world_size % run.parallel.model_parallel_size:
        return [f"--world-size {tool.world_size} is not divisible by the model parallel sizes' product"]
    return list(run.model.problems())


def description(run: RunConfig, tool: Options) -> dict[str, Any]:
    """Parameters, work and memory of one model."""
    model, layout = describe.with_vocabulary(run), describe.layout_of(run)
    return {
        "model": run.init.model_preset or "custom",
        "layers": model.num_layers,
        "heads": model.num_attention_heads,
        "vocabulary": model.vocab_rows,
        "parameters": describe.parts(model),
        "memory_bytes_per_device": footprint.memory(model, layout),
        **_figures(model, layout.seq_length, tool),
    }


def _figures(model: ModelConfig, seq_length: int, tool: Options) -> dict[str, Any]:
    flops = model.flops_per_token(seq_length)
    return {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "total_parameters": model.num_parameters,
        "embedding_and_head_share": describe.embedding_share(model),
        "flops_per_token": flops,
        "tokens_per_second_per_device": tool.sustained_tflops * 1e12 / flops,
    }


def design(run: RunConfig, tool: Options, typed: dict[str, Any]) -> dict[str, Any]:
    """Models of --params parameters, with PanGu-pi's modules unless they were switched off."""
    pi = ("series_activation_order", "augmented_shortcuts", "augmented_shortcut_reduction")
    like = dataclasses.replace(
        PRESETS["pangu-pi-1b-pro"],
        softmax_vocab_size=None,
        padded_vocab_size=describe.vocabulary_of(run),
        **{name: typed[name] for name in pi if name in typed},
    )
    seq_length = run.data.seq_length or like.max_position_embeddings
    models = list(describe.candidates(tool.params or 0, like))
    rows = [{"layers": model.num_layers, **_figures(model, seq_length, tool)} for model in models]
    found: dict[str, Any] = {"params": tool.params, "vocabulary": like.vocab_rows, "candidates": rows}
    best = recipe.best_shape(models)
    if tool.tokens and best:
        choices = recipe.recipe(best, tool.tokens, seq_length)
        modules = [f"{flag_of(name)} {typed[name]}" for name in pi if name in typed]
        words = ["--model-preset pangu-pi-1b-pro", *modules, *chain(*(choice.flags for choice in choices))]
        found |= {"recipe": [*map(dataclasses.asdict, choices)], "command": words}
    return found


def _lines(summary: dict[str, Any]) -> list[str]:
    return _design_lines(summary) if "candidates" in summary else _description_lines(summary)


def _description_lines(summary: dict[str, Any]) -> list[str]:
    total, memory = summary["total_parameters"], summary["memory_bytes_per_device"]
    lines = [
        f"{summary['model']}: {summary['layers']} layers, hidden {summary['hidden_size']}, "
        f"{summary['heads']} heads, FFN {summary['ffn_hidden_size']}, vocabulary {summary['vocabulary']}",
        "",
        f"{'parameters':<22}{'number':>16}{'share':>9}",
    ]
    lines += [
        f"  {part:<20}{count:>16,}{count / total:>9.2%}" for part, count in summary["parameters"].items()
    ]
    lines += [
        f"  {'total':<20}{total:>16,}",
        f"  embedding and head  {summary['embedding_and_head_share']:>25.2%}",
        "",
        f"operations per token (forward and backward): {summary['flops_per_token'] / 1e9:.3f} GFLOP",
        f"tokens per second and device at --sustained-tflops: {summary['tokens_per_second_per_device']:,.0f}",
        "",
        "memory of the fullest device (activations are an estimate)",
    ]
    lines += [f"  {part:<20}{size / 2**30:>12.3f} GiB" for part, size in memory.items()]
    return [*lines, f"  {'total':<20}{sum(memory.values()) / 2**30:>12.3f} GiB"]


def _design_lines(summary: dict[str, Any]) -> list[str]:
    head = f"{'layers':>7}{'hidden':>8}{'FFN':>8}{'FFN/h':>7}{'parameters':>15}{'emb+head':>10}"
    lines = [head + f"{'GFLOP/token':>13}{'tokens/s':>12}"]
    for row in summary["candidates"]:
        lines.append(
            f"{row['layers']:>7}{row['hidden_size']:>8}{row['ffn_hidden_size']:>8}"
            f"{row['ffn_hidden_size'] / row['hidden_size']:>7.2f}{row['total_parameters']:>15,}"
            f"{row['embedding_and_head_share']:>10.2%}{row['flops_per_token'] / 1e9:>13.3f}"
            f"{row['tokens_per_second_per_device']:>12,.0f}"
        )
    if not summary["candidates"]:
        return ["no shape of that size has an FFN of 2 to 4 times the width"]
    return lines + (_recipe_lines(summary) if "recipe" in summary else [])


CAUTION = """\
Add tokenizer, data and --micro-batch-size; tools/plan_run.py finds the layout. Step Law was checked up to 1e9
parameters and 1e11 tokens, with models that differ from this one: try half and twice its rate. The paper's
own 1B model took 2e-4 (third-party notes)."""


def _recipe_lines(summary: dict[str, Any]) -> list[str]:
    lines = ["", "what to train, and why"]
    for choice in summary["recipe"]:
        lines += [f"  {' '.join(choice['flags'])}", f"      {choice['rule']} ({choice['source']})"]
    command = " \\\n    ".join(["torchrun pretrain_pangu_pro.py", *summary["command"], "..."])
    return [*lines, "", command, "", CAUTION]


if __name__ == "__main__":
    sys.exit(main())
