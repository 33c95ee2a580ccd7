"""FP8 scales in a checkpoint: bytes that Transformer Engine unpickles (``set_extra_state`` of its modules).

The weights-only unpickler sees only a tensor of bytes, and Transformer Engine would execute any code in it.
The bytes are therefore unpickled here first, by an unpickler that allows only a recipe, tensors and plain
values, and the result is pickled again.
"""

import io
import pickle
import sys
from typing import Any

import torch

from megatron_ext.checkpoint.bounds import require_bounded
from megatron_ext.checkpoint.errors import DamagedCheckpoint
from megatron_ext.checkpoint.safe import load_object

_RECIPES = "transformer_engine.common.recipe"
_CLASSES = {
    _RECIPES: {
        "DelayedScaling",
        "Float8CurrentScaling",
        "Float8BlockScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
        "QParams",
        "_FormatHelper",
    },
    "collections": {"OrderedDict"},
    "torch._utils": {"_rebuild_tensor_v2"},
}
#: What a tensor's bytes are read by; here always by the safe reader. The second is Megatron-Core 0.19's.
_FROM_BYTES = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FROM_BYTES:
            return lambda data: load_object(io.BytesIO(data), "a tensor of its extra state", legacy=True)
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise DamagedCheckpoint(f"it asks for {module}.{name}, which no FP8 state needs")


def without_code(key: str, state: Any) -> Any:
    """The extra state of a module, or a list of such, in a form that is safe to pass to the module.

    ``state`` is the value of ``key`` in the checkpoint: a uint8 tensor, a file of Transformer Engine 1,
    or None from layers without extra state. Returns None if Transformer Engine is not used, because nothing
    reads the state then.

    Raises:
        DamagedCheckpoint: the state holds anything but a recipe, tensors and plain values.
    """
    if isinstance(state, list):
        return [without_code(key, each) for each in state]
    if state is None or isinstance(state, torch.Tensor) and not state.numel():
        return state
    if sys.modules.get(_RECIPES) is None:
        return None
    plain = load_object(state, key) if isinstance(state, io.BytesIO) else _unpickled(key, state)
    return torch.frombuffer(bytearray(pickle.dumps(plain)), dtype=torch.uint8)


def _unpickled(key: str, state: Any) -> Any:
    if not isinstance(state, torch.Tensor):
        raise DamagedCheckpoint(f"{key} holds a {type(state).__name__}, which is no FP8 state")
    data = state.numpy().tobytes()
    try:
        require_bounded(data)
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:
        raise DamagedCheckpoint(f"{key} cannot be read safely: {error}") from error
