"""Rules that report a flag on the command line that has no effect."""

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.common.flags import without_effect
from megatron_ext.config import RunConfig, options


def flags_take_effect(run: RunConfig, typed: Typed) -> Problems:
    yield from without_effect((options()[name] for name in typed), run)


def local_attention_chooses_for_itself(run: RunConfig, typed: Typed) -> Problems:
    backend = run.layers.attention_backend
    if run.layers.transformer_impl == "local" and backend not in ("auto", "local"):
        yield (
            f"--attention-backend {backend} cannot take effect: the local layers use torch's "
            "scaled_dot_product_attention; leave it at auto, or use --transformer-impl transformer_engine"
        )


def engine_has_a_backend_left(run: RunConfig, typed: Typed) -> Problems:
    if run.layers.transformer_impl == "transformer_engine" and run.layers.attention_backend == "local":
        yield (
            "--attention-backend local switches every backend of Transformer Engine off: leave it at auto, "
            "or use --transformer-impl local"
        )


RULES = (flags_take_effect, local_attention_chooses_for_itself, engine_has_a_backend_left)
