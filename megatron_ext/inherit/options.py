"""The options of tools/inherit_checkpoint.py."""

import os
from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import flag, wrong_fields


@dataclass(frozen=True, kw_only=True)
class InheritOptions:
    """Each field is a flag of tools/inherit_checkpoint.py.

    Sizes and modules of the target default to the preset's, or without a preset to the source's.
    """

    load: str = flag(section="source", metavar="DIR")
    """Hugging Face folder or checkpoint."""

    ckpt_step: int | None = flag(None, minimum=1)
    """Iteration of the checkpoint; by default the newest."""

    tokenizer_model: str | None = flag(None, metavar="PATH")
    """Tokenizer of the source, if it has moved since the training."""

    allow_pickle: bool = False
    """Also read pytorch_model.bin, with the weights-only unpickler."""

    save: str = flag(section="target (by default as in the source)", metavar="DIR")
    """Output folder, without checkpoints in it."""

    model_preset: str | None = flag(None, metavar="NAME")
    """Use the shape of a preset; flags on the command line override it."""

    target_num_layers: int | None = None
    """Number of layers."""

    target_hidden_size: int | None = None
    """Channels of the residual stream."""

    target_ffn_hidden_size: int | None = None
    """Channels of the FFN."""

    target_num_attention_heads: int | None = None
    """Number of query heads; the number of heads per group stays the source's."""

    target_num_query_groups: int | None = None
    """Number of query groups."""

    target_tokenizer_model: str | None = flag(None, metavar="PATH")
    """Tokenizer of the target, usually a compressed one."""

    series_activation_order: int | None = None
    """Number of terms of the series activation; new terms start at zero."""

    augmented_shortcuts: int | None = None
    """Number of augmented shortcuts; new ones start without effect."""

    augmented_shortcut_reduction: int | None = None
    """Hidden size divided by the width of the shortcuts' bottleneck."""

    untie_embeddings_and_output_weights: bool = False
    """Give the target a separate output layer, also if the source ties it to the embedding."""

    report: str | None = flag(None, metavar="DIR")
    """Folder for report.json, report.png and choice.npz; by default SAVE/inheritance."""

    depth_policy: Literal["ends", "importance", "uniform", "list", "learned"] = flag(
        "ends", section="selection"
    )
    """How to select the layers to keep."""

    layers: list[int] | None = None
    """The layers of --depth-policy list, from 0."""

    width_criterion: Literal["random", "l1", "l2", "taylor", "learned"] = "l2"
    """Criterion that selects the channels to keep."""

    seed: int = flag(1234, minimum=0)
    """Seed of random selections, new weights and samples."""

    data_path: list[str] | None = flag(None, section="calibration", metavar="PREFIX")
    """Datasets that were tokenized with the target's tokenizer."""

    data_cache_path: str | None = flag(None, metavar="DIR")
    """Folder for the datasets' index files."""

    seq_length: int = flag(512, minimum=1)
    """Tokens per sample."""

    micro_batch_size: int = flag(4, minimum=1)
    """Samples per forward pass."""

    calibration_samples: int = flag(64, minimum=1)
    """Samples for importance, taylor, and the losses before and after."""

    rescale_norms: bool = flag(True, "--no-rescale-norms")
    """Leave the gains of norms that lose channels as they are. With --data-path they are rescaled, so that
    the norms' outputs keep their scale on that text."""

    calibration_dtype: Literal["fp32", "bf16"] | None = None
    """Number format of the source during calibration; by default fp32 on a CPU and the stored one on a GPU.
    bf16 halves the memory, and is fast on CPUs with bf16 instructions; scores and masks stay fp32."""

    mask_steps: int = flag(100, minimum=1, section="learned masks")
    """Maximum number of steps."""

    mask_batch_size: int = flag(8, minimum=1)
    """Samples per step."""

    mask_lr: float = flag(0.03, above=0)
    """Learning rate; falls to 0."""

    mask_temperature: list[float] = flag([0.3, 0.03], nargs=2, metavar=("START", "END"))
    """Temperature of the masks' sigmoid, at the start and at the end."""

    mask_patience: int = flag(30, minimum=1)
    """Stop after this many steps with the same selection."""

    mask_state: str | None = flag(None, metavar="FILE")
    """File to save the state to, and to resume from if it exists."""

    def problems(self) -> list[str]:
        """Problems of the options themselves, one sentence each."""
        problems = list(wrong_fields(self))
        learned = self.width_criterion == "learned"
        if self.depth_policy == "learned" and not learned:
            problems.append("--depth-policy learned needs --width-criterion learned")
        if (self.depth_policy == "list") != bool(self.layers):
            problems.append("--layers and --depth-policy list belong together")
        needs = [f"--depth-policy {self.depth_policy}"] * (self.depth_policy in ("importance", "learned"))
        needs += [f"--width-criterion {self.width_criterion}"] * (
            self.width_criterion in ("taylor", "learned")
        )
        if needs and not self.data_path:
            problems.append(f"{' and '.join(needs)} looks at text: give --data-path")
        if not self.rescale_norms and not self.data_path:
            problems.append(
                "--no-rescale-norms cannot take effect: gains are rescaled with --data-path alone"
            )
        if self.mask_state and not learned:
            problems.append("--mask-state cannot take effect: needs --width-criterion learned")
        unit = self.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
        if learned and unit > 0 and self.mask_batch_size % unit:
            problems.append(
                f"--mask-batch-size {self.mask_batch_size} is not divisible by --micro-batch-size x "
                f"processes = {unit}"
            )
        start, end = self.mask_temperature
        if not float("inf") > start >= end > 0:
            problems.append("--mask-temperature must fall from START to END, both above 0")
        return problems
