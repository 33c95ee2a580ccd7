"""Megatron-Core's GPT datasets, with a loss mask of its own for every sample.

Upstream keeps the masks and positions of the first sample that a process reads and takes copies of
them for all later ones, but only after it has masked that sample's pad tokens: they stay masked in
every other sample, so that losses depend on ``--num-workers`` and on where a run was resumed.
"""

from typing import Any

import torch
from megatron.core.datasets import gpt_dataset


class _OwnLossMasks:
    """Fills upstream's cache at the start, from a sequence without special tokens."""

    config: gpt_dataset.GPTDatasetConfig
    masks_and_position_ids_are_cacheable: bool

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if not self.masks_and_position_ids_are_cacheable:
            return
        self.cached_attention_mask, self.cached_loss_mask, self.cached_position_ids = (
            gpt_dataset._get_ltor_masks_and_position_ids(
                data=torch.zeros(self.config.sequence_length, dtype=torch.int64),
                eod_token=self.config.tokenizer.eod,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=self.config.create_attention_mask,
            )
        )
        self.masks_and_position_ids_are_cached = True


# The names are upstream's, because they are part of the names of index files.


class GPTDataset(_OwnLossMasks, gpt_dataset.GPTDataset):
    """Samples of [s] tokens from documents, in upstream's order."""


class MockGPTDataset(_OwnLossMasks, gpt_dataset.MockGPTDataset):
    """Samples of [s] made-up tokens (``--mock-data``)."""
