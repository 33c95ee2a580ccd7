"""A model of 7B shape on disk, with random weights, written layer by layer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_ext.interchange.hf_config import write_config
from megatron_ext.interchange.mapping import architecture_of
from megatron_ext.interchange.shape import ModelShape

#: Random numbers that every tensor repeats: drawing billions would take minutes.
_BLOCK = 1 << 20


def shape_7b(layers: int) -> ModelShape:
    """Llama-2-7B's shape with so many layers, in bf16."""
    return ModelShape(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        vocab_size=32000,
        padded_vocab_size=32000,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )


def write_llama(folder: Path, shape: ModelShape) -> Path:
    """A Hugging Face folder, a safetensors file a layer; one layer is in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(shape)))
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(shape.dtype)
    files: dict[object, list] = {}
    for entry in architecture_of(shape).entries_of(shape):
        files.setdefault(entry.ours if entry.layer is None else entry.layer, []).append(entry)
    index = {}
    for number, entries in enumerate(files.values()):
        tensors = {}
        for entry in entries:
            sizes = entry.layout.sizes(shape.parameters()[entry.ours], shape)
            for name, size in zip(entry.theirs, sizes, strict=True):
                repeats = -(-size.numel() // _BLOCK)
                tensors[name] = block.repeat(repeats)[: size.numel()].view(size).clone()
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
