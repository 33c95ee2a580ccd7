"""What an inheritance is asked to do."""

import os
from dataclasses import dataclass

DEPTH = ("ends", "importance", "uniform", "list", "learned")
WIDTH = ("random", "l1", "l2", "taylor", "learned")


@dataclass(frozen=True, kw_only=True)
class InheritOptions:
    """An inheritance, by the names of the flags of tools/inherit_checkpoint.py, which say what they mean.

    Sizes and modules of the target that are None are the preset's, or else the source's.
    """

    load: str
    save: str
    ckpt_step: int | None = None
    tokenizer_model: str | None = None
    allow_pickle: bool = False

    model_preset: str | None = None
    target_num_layers: int | None = None
    target_hidden_size: int | None = None
    target_ffn_hidden_size: int | None = None
    target_num_attention_heads: int | None = None
    target_num_query_groups: int | None = None
    target_tokenizer_model: str | None = None
    series_activation_order: int | None = None
    augmented_shortcuts: int | None = None
    augmented_shortcut_reduction: int | None = None
    untie_embeddings_and_output_weights: bool = False
    report: str | None = None

    depth_policy: str = "ends"
    layers: list[int] | None = None
    width_criterion: str = "l2"
    seed: int = 1234

    data_path: list[str] | None = None
    data_cache_path: str | None = None
    seq_length: int = 512
    micro_batch_size: int = 4
    calibration_samples: int = 64
    calibration_dtype: str | None = None

    mask_steps: int = 100
    mask_batch_size: int = 8
    mask_lr: float = 0.03
    mask_temperature: tuple[float, float] = (0.3, 0.03)
    mask_patience: int = 30
    mask_state: str | None = None

    def problems(self) -> list[str]:
        """What is wrong with them by themselves, one sentence each."""
        found = []
        learned = self.width_criterion == "learned"
        if self.depth_policy == "learned" and not learned:
            found.append("--depth-policy learned needs --width-criterion learned")
        if (self.depth_policy == "list") != bool(self.layers):
            found.append("--layers and --depth-policy list belong together")
        needs = [f"--depth-policy {self.depth_policy}"] * (self.depth_policy in ("importance", "learned"))
        needs += [f"--width-criterion {self.width_criterion}"] * (self.width_criterion in WIDTH[3:])
        if needs and not self.data_path:
            found.append(f"{' and '.join(needs)} looks at text: give --data-path")
        if self.mask_state and not learned:
            found.append("--mask-state cannot take effect: needs --width-criterion learned")
        for name in (
            "seq_length",
            "micro_batch_size",
            "calibration_samples",
            "mask_steps",
            "mask_batch_size",
            "mask_patience",
        ):
            if getattr(self, name) < 1:
                found.append(f"--{name.replace('_', '-')} must be at least 1")
        unit = self.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
        if learned and unit > 0 and self.mask_batch_size % unit:
            found.append(
                f"--mask-batch-size {self.mask_batch_size} is not divisible by --micro-batch-size x "
                f"processes = {unit}"
            )
        start, end = self.mask_temperature
        if not float("inf") > start >= end > 0:
            found.append("--mask-temperature must fall from START to END, both above 0")
        if not self.mask_lr > 0:
            found.append("--mask-lr must be above 0")
        return found
