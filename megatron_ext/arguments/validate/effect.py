"""A flag that was typed and cannot take effect is an error, never ignored."""

from megatron_ext.config import flag_of
from megatron_ext.config.dependences import DEPENDENCES


def flags_take_effect(args, typed):
    for dependence in DEPENDENCES:
        idle = [name for name in dependence.names if name in typed and not dependence.holds(args)]
        if idle:
            spelled = ", ".join(map(flag_of, idle))
            yield f"{spelled} cannot take effect: needs {dependence.needs}"


def local_attention_chooses_for_itself(args, typed):
    if args.transformer_impl == "local" and args.attention_backend not in ("auto", "local"):
        yield (
            f"--attention-backend {args.attention_backend} cannot take effect: the local layers use torch's "
            "scaled_dot_product_attention; leave it at auto, or use --transformer-impl transformer_engine"
        )


def engine_has_a_backend_left(args, typed):
    if args.transformer_impl == "transformer_engine" and args.attention_backend == "local":
        yield (
            "--attention-backend local switches every backend of Transformer Engine off: leave it at auto, "
            "or use --transformer-impl local"
        )


RULES = (flags_take_effect, local_attention_chooses_for_itself, engine_has_a_backend_left)
