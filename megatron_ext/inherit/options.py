"""What an inheritance is asked to do."""

import os
from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import flag, wrong_fields


@dataclass(frozen=True, kw_only=True)
class InheritOptions:
    """An inheritance; each field is a flag of tools/inherit_checkpoint.py.

    Sizes and modules of the target that are None are the preset's, or else the source's.
    """

    load: str = flag(section="source", metavar="DIR")
    """Hugging Face folder or checkpoint."""

    ckpt_step: int | None = flag(None, minimum=1)
    """Iteration of a checkpoint; without it, the newest."""

    tokenizer_model: str | None = flag(None, metavar="PATH")
    """The source's tokenizer, if it moved since the training."""

    allow_pickle: bool = False
    """Read pytorch_model.bin too, weights only."""

    save: str = flag(section="target (what is not given is as in the source)", metavar="DIR")
    """A folder without checkpoints."""

    model_preset: str | None = flag(None, metavar="NAME")
    """Shape by name; flags that are typed win."""

    target_num_layers: int | None = None
    """Layers."""

    target_hidden_size: int | None = None
    """Hidden channels."""

    target_ffn_hidden_size: int | None = None
    """FFN channels."""

    target_num_attention_heads: int | None = None
    """Query heads; the source's number of heads per group is kept."""

    target_num_query_groups: int | None = None
    """Query groups."""

    target_tokenizer_model: str | None = flag(None, metavar="PATH")
    """Its tokenizer, often a compressed one."""

    series_activation_order: int | None = None
    """Order of the series activation; new terms start at zero."""

    augmented_shortcuts: int | None = None
    """Augmented shortcuts; new ones start without effect."""

    augmented_shortcut_reduction: int | None = None
    """Hidden / bottleneck of the augmented shortcuts."""

    untie_embeddings_and_output_weights: bool = False
    """Give a source that ties them an output layer of its own."""

    report: str | None = flag(None, metavar="DIR")
    """Folder for report.json, report.png and choice.npz; without it, SAVE/inheritance."""

    depth_policy: Literal["ends", "importance", "uniform", "list", "learned"] = flag(
        "ends", section="selection"
    )
    """Which layers stay."""

    layers: list[int] | None = None
    """The layers of --depth-policy list, from 0."""

    width_criterion: Literal["random", "l1", "l2", "taylor", "learned"] = "l2"
    """Which channels stay."""

    seed: int = flag(1234, minimum=0)
    """Seed of random selections, new weights and samples."""

    data_path: list[str] | None = flag(None, section="calibration", metavar="PREFIX")
    """Datasets of the target's tokenizer."""

    data_cache_path: str | None = flag(None, metavar="DIR")
    """Where indices of datasets are kept."""

    seq_length: int = flag(512, minimum=1)
    """Tokens per sample."""

    micro_batch_size: int = flag(4, minimum=1)
    """Samples per forward pass."""

    calibration_samples: int = flag(64, minimum=1)
    """Samples for importance, taylor, and the losses before and after."""

    calibration_dtype: Literal["fp32", "bf16"] | None = None
    """Number format of the source while it reads text; without it, fp32 on a CPU and its own on a GPU.
    bf16 halves the memory, and is fast on CPUs with bf16 instructions; scores and masks stay fp32."""

    mask_steps: int = flag(100, minimum=1, section="learned masks")
    """Steps at most."""

    mask_batch_size: int = flag(8, minimum=1)
    """Samples per step."""

    mask_lr: float = flag(0.03, above=0)
    """Learning rate; falls to 0."""

    mask_temperature: list[float] = flag([0.3, 0.03], nargs=2, metavar=("START", "END"))
    """Temperature of the sigmoid that gives the masks."""

    mask_patience: int = flag(30, minimum=1)
    """Stop after this many steps without a change."""

    mask_state: str | None = flag(None, metavar="FILE")
    """Save the state here, and continue from it where it exists."""

    def problems(self) -> list[str]:
        """What is wrong with them by themselves, one sentence each."""
        found = list(wrong_fields(self))
        learned = self.width_criterion == "learned"
        if self.depth_policy == "learned" and not learned:
            found.append("--depth-policy learned needs --width-criterion learned")
        if (self.depth_policy == "list") != bool(self.layers):
            found.append("--layers and --depth-policy list belong together")
        needs = [f"--depth-policy {self.depth_policy}"] * (self.depth_policy in ("importance", "learned"))
        needs += [f"--width-criterion {self.width_criterion}"] * (
            self.width_criterion in ("taylor", "learned")
        )
        if needs and not self.data_path:
            found.append(f"{' and '.join(needs)} looks at text: give --data-path")
        if self.mask_state and not learned:
            found.append("--mask-state cannot take effect: needs --width-criterion learned")
        unit = self.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
        if learned and unit > 0 and self.mask_batch_size % unit:
            found.append(
                f"--mask-batch-size {self.mask_batch_size} is not divisible by --micro-batch-size x "
                f"processes = {unit}"
            )
        start, end = self.mask_temperature
        if not float("inf") > start >= end > 0:
            found.append("--mask-temperature must fall from START to END, both above 0")
        return found
