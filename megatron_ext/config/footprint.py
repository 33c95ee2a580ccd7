"""Calculates the memory of a rank from the model's shape and its layout.

tests/unit/training/test_trace.py requires agreement within 10 % with a traced training step of rank 0 in real
layouts (training/trace.py). Weights, gradients and optimizer are exact except for the buffers' padding.
"""

from megatron_ext.config.describe import Layout, parameters_of_rank, vocabulary_of_rank
from megatron_ext.config.model import ModelConfig


def memory(model: ModelConfig, layout: Layout) -> dict[str, float]:
    """Kind -> bytes on the pipeline stage that needs most memory; activations are an estimate."""
    return memory_of_stage(model, layout, fullest_stage(model, layout))


def fullest_stage(model: ModelConfig, layout: Layout) -> int:
    """The pipeline stage that needs most memory; the first of several."""
    return max(range(layout.pipeline), key=lambda stage: sum(memory_of_stage(model, layout, stage).values()))


def memory_of_stage(model: ModelConfig, layout: Layout, stage: int) -> dict[str, float]:
    """Kind -> bytes on a rank of one pipeline stage; activations are an estimate."""
    held = parameters_of_rank(model, layout, stage)
    shared = layout.distributed_optimizer or layout.layer_wise
    return {
        "weights": held * layout.bytes_each,
        "gradients": held * 4,
        "optimizer": _optimizer(model, layout, stage) / (layout.data if shared else 1),
        "activations": _activations(model, layout, stage),
    }


def _optimizer(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Bytes of the optimizer's state: Adam's two moments, or Muon's one of each hidden matrix (vectors have
    two, and are too few to count), and an fp32 copy of weights that are not fp32 themselves."""
    held = parameters_of_rank(model, layout, stage)
    copies = 4 * held if layout.bytes_each < 4 else 0
    moments = 4 * (held + vocabulary_of_rank(model, layout, stage)) if layout.muon else 8 * held
    return moments + copies


def _activations(model: ModelConfig, layout: Layout, stage: int) -> float:
    """Bytes that a stage keeps for its backward pass, plus the peak of temporary tensors.

    The peak is in a layer's backward pass (with recomputation including all that the layer keeps), or on the
    last stage in the loss. Megatron-Core allocates a gradient tensor even if the gradient is summed
    elsewhere.
    """
    each, tokens = layout.bytes_each, layout.micro_batch * layout.seq_length
    one_layer, stream = layer_activations(model, layout), model.hidden_size / layout.stream_split
    kept = sum(_passes_in_flight(model, layout, stage)) * (stream if layout.recompute else one_layer)
    kept += model.hidden_size if layout.sequence_parallel else 0  # Megatron-Core's gather buffer
    inner = (1 + model.gated) * model.ffn_hidden_size / layout.tensor
    passing = inner + stream + (one_layer if layout.recompute else 0)
    size = each * (tokens * (kept + passing) + model.hidden_size * inner)
    size += each * layout.seq_length**2 if any(model.windowed) else 0  # one mask for all windows
    if stage < layout.pipeline - 1:
        return size
    # The logits, overwritten by their gradient, and the head's gradient; without a kernel a copy in fp32.
    logits = max(each * (tokens + model.hidden_size), 0 if layout.kernels else (4 + each % 4) * tokens)
    return max(size, each * tokens * (kept + 2 * stream) + logits * model.vocab_rows / layout.tensor)


def _passes_in_flight(model: ModelConfig, layout: Layout, stage: int) -> list[float]:
    """The layers of each forward pass of a stage before the first backward pass frees activations.

    1F1B, or Megatron-Core's interleaved schedule, where ``pipeline`` micro batches go through a chunk, then
    through the next (pipeline_parallel/schedules.py: get_pp_rank_microbatches).
    """
    chunks, waiting = layout.chunks(model, stage), layout.pipeline - stage
    if len(chunks) > 1:
        waiting = 2 * waiting - 1 + (len(chunks) - 1) * layout.pipeline
    passes = min(waiting, layout.micro_batches * len(chunks))
    return [chunks[number // layout.pipeline % len(chunks)] for number in range(passes)]


def layer_activations(model: ModelConfig, layout: Layout) -> float:
    """Elements per token that one layer keeps, without dropout and with flash attention.

    Residual stream and normed input, twice (4 h); with output norms their input instead, with both norms both
    (6 h); attention; gate, up and their product; the shortcut's bottleneck. Without its kernel the series
    activation also keeps the input of each term's SiLU and the sum of the terms.
    """
    normed = 6 if model.norm_placement == "both" else 4
    stream = (normed * model.hidden_size + 2 * model.shortcut_width) / layout.stream_split
    terms = model.series_activation_order
    inner = 2 + model.gated + (terms + 1 if terms and not layout.kernels else 0)
    return stream + (_attention(model, layout) + inner * model.ffn_hidden_size) / layout.tensor


def _attention(model: ModelConfig, layout: Layout) -> float:
    """The joint projection, the output, and rotated or normed copies of queries and keys.

    The kernel rotates in place, except queries that share a key (kernels/triton_rope.py). A norm across heads
    copies queries and keys, and under tensor parallelism saves the normed values too. With a window, keys and
    values are repeated for the heads that share them (models/attention.py).
    """
    query, key = model.query_width, model.query_groups * model.kv_channels
    copies = query + key
    if not model.qk_layernorm and (layout.kernels or model.position_embedding_type != "rope"):
        copies = query if key < query and model.position_embedding_type == "rope" else 0
    if model.qk_layernorm and model.qk_layernorm_across_heads:
        copies += (query + key) * min(layout.tensor, 2)
    repeated = 2 * (query - key) * sum(model.windowed) / model.num_layers
    return 2 * query + 2 * key + copies + repeated
