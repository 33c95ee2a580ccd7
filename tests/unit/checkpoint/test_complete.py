"""A checkpoint holds every parameter, and both of Adam's moments of each."""

import re

from megatron_ext.checkpoint.safe import load_metadata
from megatron_ext.models.builder import unwrap
from megatron_ext.models.initialization import described
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments


def test_every_parameter_and_its_moments_are_saved(saved_once):
    model = unwrap(Run(arguments(Layout())).model[0])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    saved = load_metadata(saved_once / "iter_0000002").state_dict_metadata
    walked = set()
    for parameter, shards in described(model):
        key, layers = re.subn(r"decoder\.layers\.\d+\.", "decoder.layers.", shards[0].key)
        shape = (4,) * layers + tuple(shards[0].global_shape)  # layers are stacked in the file
        for entry in (key, f"optimizer.state.exp_avg.{key}", f"optimizer.state.exp_avg_sq.{key}"):
            assert entry in saved, f"{names[id(parameter)]} is not saved as {entry}"
            assert tuple(saved[entry].size) == shape, entry
        walked.add(names[id(parameter)])
    assert walked == set(names.values())
    pi = [name for name in walked if "series_activation" in name or "augmented_shortcut" in name]
    assert len(pi) == 4 * 4  # scale, bias, down and up of each layer
