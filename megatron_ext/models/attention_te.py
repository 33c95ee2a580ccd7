"""Transformer Engine's attention over packed documents."""

from functools import lru_cache
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.kernels import documents


class TEDocumentAttention(TEDotProductAttention):
    """Attention that takes the starts of documents for a mask, by their cumulative lengths (``thd``)."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As in Megatron-Core; ``attention_mask`` [b, s] are starts of documents."""
        if not documents.is_starts(attention_mask):
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        length, batch = query.shape[:2]
        kwargs["packed_seq_params"] = _packed(attention_mask)
        packed = [t.transpose(0, 1).flatten(0, 1) for t in (query, key, value)]  # [b * s, n, hn]
        context = super().forward(*packed, None, *args, **kwargs)  # [b * s, np * hn]
        return context.view(batch, length, -1).transpose(0, 1).contiguous()


@lru_cache(maxsize=1)
def _packed(starts: Tensor) -> PackedSeqParams:
    """For all layers, because the number of documents has to be waited for.

    The longest document is said to be the sequence: a number that changed with each batch would have the
    kernels chosen anew.
    """
    ends, length = documents.boundaries(starts), starts.size(1)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length
    )
