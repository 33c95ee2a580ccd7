"""``--use-checkpoint-args``: the model and tokenizer of the checkpoint that a run starts from."""

from argparse import Namespace

#: Arguments that describe the model and its tokenizer, not the run (Megatron-LM's
#: checkpointing.py:load_args_from_checkpoint), and those of the pi modules.
DESCRIBE_THE_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "add_bias_linear",
    "add_qkv_bias",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "normalization",
    "layernorm_epsilon",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "attention_dropout",
    "hidden_dropout",
    "series_activation_order",
    "augmented_shortcuts",
    "augmented_shortcut_reduction",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
    "padded_vocab_size",
)


def take_model(args: Namespace, typed: Namespace) -> list[str]:
    """Set what describes the model from the checkpoint that the run would start from; returns problems.

    That is the one in --load, or, before there is one, that in --pretrained-checkpoint. What was typed
    wins, as a changed --attention-dropout or a moved tokenizer must be possible; a shape that does not
    fit the weights is refused when they are loaded. A folder without a checkpoint is a problem only if
    nothing else describes the model.
    """
    if not args.use_checkpoint_args:
        return []
    folders = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint}
    if args.load is None:
        return ["--use-checkpoint-args needs --load"]
    from megatron_ext.training.checkpointing import CheckpointError, read_checkpoint_args

    saved = None
    for flag, folder in folders.items():
        if folder is None or saved is not None:
            continue
        try:
            saved = read_checkpoint_args(folder, args.ckpt_step if flag == "--load" else None)
        except (CheckpointError, OSError, ValueError) as error:
            return [f"--use-checkpoint-args: {error}"]
        if saved is not None and not hasattr(saved, "num_layers"):
            return [f"--use-checkpoint-args: the checkpoint in {flag} {folder} holds no arguments"]
    if saved is None and args.num_layers is not None:
        return []  # the first start of a run that is given its shape, as upstream has it
    if saved is None:
        looked = " or ".join(f"{flag} {folder}" for flag, folder in folders.items() if folder is not None)
        return [f"--use-checkpoint-args: there is no checkpoint in {looked}"]
    for name in DESCRIBE_THE_MODEL:
        if name not in typed and getattr(saved, name, None) is not None:
            setattr(args, name, getattr(saved, name))
    return []
