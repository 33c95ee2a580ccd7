"""The loss of trained targets on a whole held-out text; what benchmarks/inherit.py measures with."""

from pathlib import Path

from megatron_ext import platform

platform.activate("cpu")

import torch  # noqa: E402

from megatron_ext.checkpoint import load_checkpoint  # noqa: E402
from megatron_ext.inference import load_for_inference  # noqa: E402
from megatron_ext.inherit.calibration import TokenWindows, mean_loss, read_documents  # noqa: E402
from megatron_ext.models.builder import build_model  # noqa: E402
from megatron_ext.models.config import transformer_config  # noqa: E402


class HeldOut:
    """Bits per byte of one text, in the same windows for every model, in fp32.

    Args:
        trained: folder of a checkpoint whose arguments and tokenizer all models share.
        prefix: dataset of the text.
        length: tokens of a window; each token is predicted once.
    """

    def __init__(self, trained: Path, prefix: Path, length: int):
        self.model, tokenizer, self.run = load_for_inference(
            str(trained), bf16=False, params_dtype=torch.float32
        )
        self.token_bytes = tokenizer.token_bytes()
        self.windows = TokenWindows.of(read_documents([str(prefix)], 1 << 40), length)

    def of_checkpoint(self, folder: Path, iteration: int) -> float:
        """The loss of a checkpoint's weights."""
        load_checkpoint(str(folder), model=[self.model], run=self.run, iteration=iteration)
        return self._loss(self.model)

    def of_random_weights(self, trained: Path) -> float:
        """The loss of the weights that the run of that checkpoint started from."""
        from megatron_ext.checkpoint import read_checkpoint_args

        saved = read_checkpoint_args(trained)
        if saved is None:
            raise FileNotFoundError(f"{trained}: no checkpoint found")
        run = self.run.but(seed=saved["seed"])
        return self._loss(build_model(transformer_config(run), run)[0].eval())

    def _loss(self, model) -> float:
        return mean_loss(model, self.windows, 8, self.token_bytes).bits_per_byte
