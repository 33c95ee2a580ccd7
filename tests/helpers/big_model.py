"""A model of 7B shape on disk, with random weights, written layer by layer."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.hf_config import write_config
from megatron_ext.interchange.llama import llama_like
from megatron_ext.interchange.mapping import architecture_of

#: Random numbers that every tensor repeats: drawing billions would take minutes.
_BLOCK = 1 << 20


def llama_7b(layers: int) -> ModelConfig:
    """Llama-2-7B with so many layers."""
    return llama_like(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        vocab_size=32000,
        padded_vocab_size=32000,
        max_position_embeddings=2048,
        untie_embeddings_and_output_weights=True,
    )


def write_llama(folder: Path, model: ModelConfig) -> Path:
    """A Hugging Face folder in bf16, a safetensors file a layer; one layer is in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(model, torch.bfloat16)))
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    files: dict[object, list] = {}
    for entry in architecture_of(model).entries_of(model):
        files.setdefault(entry.ours if entry.layer is None else entry.layer, []).append(entry)
    index = {}
    for number, entries in enumerate(files.values()):
        tensors = {}
        for entry in entries:
            sizes = entry.layout.sizes(model.parameters()[entry.ours], model)
            for name, size in zip(entry.theirs, sizes, strict=True):
                count = math.prod(size)
                tensors[name] = block.repeat(-(-count // _BLOCK))[:count].view(size).clone()
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
