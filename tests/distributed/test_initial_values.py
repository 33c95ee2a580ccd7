"""Initial values of parameters that Transformer Engine keeps in FP8, as the optimizer copies them."""

import torch

from megatron_ext.models.initialization import initialize
from tests.helpers.models import small_config, small_model
from tests.helpers.parallel import Layout


def kept_values() -> list[tuple[str, bool, bool, bool]]:
    """For each random parameter: its name, and whether its copy is flat, contiguous and correct."""
    config = small_config()
    (model,) = small_model(config)
    for parameter in model.parameters():
        parameter._high_precision_init_val = None
    initialize(model, config, seed=5)
    found = []
    for name, parameter in model.named_parameters():
        kept = parameter._high_precision_init_val
        if kept is not None:
            own = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
            found.append((name, kept.is_contiguous(), own, torch.equal(kept, parameter)))
    return found


def test_values_from_before_the_rounding_can_be_viewed_flat(pool):
    """The distributed optimizer views them so; linear_proj and linear_fc2 are split by columns."""
    for found in pool.run(Layout(tp=2), kept_values):
        names = {name.split(".")[-2] for name, *_ in found}
        assert {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"} <= names
        assert all(flat and own and same for _, flat, own, same in found), found
