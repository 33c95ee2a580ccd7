"""Progress during an inheritance, and its report: numbers and a chart."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.common.files import write_aside, write_json
from megatron_ext.common.progress import Progress
from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.selection import Selection
from megatron_ext.interchange.llama import beyond_plain


def progress(what: str, total: int | None) -> Progress:
    """A progress bar to ``total``, shown only on the first rank."""
    return Progress(what, total, quiet=os.environ.get("RANK", "0") != "0")


def facts(model: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """A model's entry in the report, and the source's in a mask state; its names must not change."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.kv_channels,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_rows,
        "tied": model.tied,
        "qkv_bias": model.add_qkv_bias,
        "norm_epsilon": model.layernorm_epsilon,
        "rotary_base": model.rotary_base,
        "rope_scaling_factor": model.rope_scaling_factor if model.use_rope_scaling else None,
        "max_position_embeddings": model.max_position_embeddings,
        "series_activation_order": model.series_activation_order,
        "augmented_shortcuts": model.augmented_shortcuts,
        "augmented_shortcut_reduction": model.augmented_shortcut_reduction,
        "dtype": str(dtype),
        **beyond_plain(model),
    }


def write(folder: Path, summary: dict[str, Any], result: Any) -> None:
    """report.json, choice.npz (the indices kept) and, where matplotlib is installed, report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "choice.npz", lambda file: np.savez_compressed(file, **result.selection.arrays()))
    try:
        import matplotlib
    except ImportError:
        print("report.png is left out: it needs pip install matplotlib", file=sys.stderr)
    else:
        matplotlib.use("Agg")
        write_aside(folder / "report.png", lambda file: draw(file, summary, result))
    write_json(folder / "report.json", summary)


def draw(file: Any, summary: dict[str, Any], result: Any) -> None:
    """Draw the importance of layers, the channels kept, and the mask training if there was one."""
    from matplotlib import pyplot

    learned = summary.get("learned")
    figure, axes = pyplot.subplots(1, 3 if learned else 2, figsize=(15 if learned else 10, 4.2))
    _draw_layers(axes[0], summary)
    _draw_channels(axes[1], summary, result.selection)
    if learned:
        axes[2].plot(learned["losses"], linewidth=1)
        axes[2].set(title="Learned masks", xlabel="step", ylabel="loss of the masked model, nats per token")
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _draw_layers(axis: Any, summary: dict[str, Any]) -> None:
    depth, count = summary["depth"], summary["source"]["num_layers"]
    kept = np.isin(np.arange(count), depth["kept"])
    heights, label = np.where(kept, 1.0, 0.0), "kept"
    if "loss_without" in depth:
        base = summary.get("loss_with_target_vocabulary", summary["loss_before"])["nats"]
        heights, label = np.array(depth["loss_without"]) - base, "loss when it is skipped, nats more a token"
        if heights.min() > 0 and heights.max() > 20 * np.median(heights):
            axis.set_yscale("log")
    axis.bar(np.arange(count), heights, color=np.where(kept, "tab:blue", "lightgray"))
    axis.set(title=f"Layers: {depth['policy']} (blue is kept)", xlabel="layer of the source", ylabel=label)


def _draw_channels(axis: Any, summary: dict[str, Any], selection: Selection) -> None:
    """Draw the density of kept channels: a line for the residual stream and one per layer's FFN."""
    source, bins = summary["source"], 128
    rows = [_density(selection.hidden.numpy(), source["hidden_size"], bins)]
    rows += [_density(ffn.numpy(), source["ffn_hidden_size"], bins) for ffn in selection.ffn]
    picture = axis.imshow(
        np.stack(rows), aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=(0, 1, len(rows), 0)
    )
    names = ["hidden", *(f"layer {layer}" for layer in selection.layers.tolist())]
    axis.set_yticks(np.arange(len(rows)) + 0.5, names, fontsize=7)
    criterion = summary["width"]["criterion"]
    axis.set(title=f"Channels: {criterion}", xlabel="position among the source's channels")
    axis.figure.colorbar(picture, ax=axis, label="share kept")


def _density(kept: np.ndarray, count: int, bins: int) -> np.ndarray:
    """Fraction of the channels that are kept, in each of ``bins`` bins."""
    edges = np.linspace(0, count, min(bins, count) + 1)
    share = np.histogram(kept, edges)[0] / np.histogram(np.arange(count), edges)[0]
    return np.repeat(share, -(-bins // len(share)))[:bins]


def lines(summary: dict[str, Any]) -> list[str]:
    """The report in a few lines of text."""
    source, target, vocabulary = (summary[name] for name in ("source", "target", "vocabulary"))
    text = [
        f"{source['parameters']:,} parameters -> {target['parameters']:,}: layers {source['num_layers']} -> "
        f"{target['num_layers']}, hidden {source['hidden_size']} -> {target['hidden_size']}, FFN "
        f"{source['ffn_hidden_size']} -> {target['ffn_hidden_size']}, query groups "
        f"{source['num_query_groups']} -> {target['num_query_groups']}, pieces {source['vocab_size']} -> "
        f"{target['vocab_size']}",
        f"layers kept ({summary['depth']['policy']}): {' '.join(map(str, summary['depth']['kept']))}",
        f"channels kept by {summary['width']['criterion']}; pieces copied {vocabulary['copied']}, "
        f"started from a mean {vocabulary['averaged']}, dropped {vocabulary['dropped']}",
    ]
    if factors := summary.get("gain_factors"):
        low, high = min(factors.values()), max(factors.values())
        text.append(f"gains of {len(factors)} norms rescaled, by {low:.3f} to {high:.3f}")
    if "learned" in summary:
        learned = summary["learned"]
        early = ", the selection had stopped changing" if learned["stopped_early"] else ""
        text.append(
            f"masks: {learned['step']} steps, {learned['tokens']:,} tokens, {learned['seconds']:.1f} s{early}"
        )
    for name in ("loss_before", "loss_with_target_vocabulary", "loss_after"):
        if name in summary:
            loss = summary[name]
            text.append(
                f"{name.replace('_', ' ')}: {loss['nats']:.4f} nats per token, "
                f"{loss['bits_per_byte']:.4f} bits per byte ({loss['tokens']:,} tokens)"
            )
    if "cost_bits_per_byte" in vocabulary:
        text.append(f"the vocabulary alone costs {vocabulary['cost_bits_per_byte']:+.4f} bits per byte")
    text.append(f"{summary['seconds']} s, at most {summary['peak_memory_gib']} GiB of memory")
    return text
