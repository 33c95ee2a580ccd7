"""Megatron-Core's GPT datasets, with a separate loss mask for every sample, and documents instead of masks.

Upstream caches the masks and positions of the first sample that a process reads and copies them for all later
ones, but only after masking that sample's pad tokens: these positions stay masked in all other samples, so
that losses depend on ``--num-workers`` and on the point of resumption.

With ``--reset-attention-mask`` a sample holds where each token's document begins ([s], kernels/documents.py),
instead of upstream's mask [1, s, s].
"""

from typing import Any

import torch
from megatron.core.datasets import gpt_dataset

from megatron_ext.kernels.documents import document_starts


class _OwnMasks:
    """Fills upstream's cache from a sequence without special tokens; adds the starts of documents."""

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

    def __getitem__(self, place: int | None) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = super().__getitem__(place)  # type: ignore[misc]  # of GPTDataset
        if self.config.reset_attention_mask:
            sample["document_starts"] = document_starts(sample["tokens"] == self.config.tokenizer.eod)
        return sample


# The class names are upstream's, because the names of index files contain them.


class GPTDataset(_OwnMasks, gpt_dataset.GPTDataset):
    """Samples of [s] tokens from documents, in upstream's order."""


class MockGPTDataset(_OwnMasks, gpt_dataset.MockGPTDataset):
    """Samples of [s] generated tokens (``--mock-data``)."""
