"""Rules against empty runs: no iteration, no training data, nothing to evaluate."""

from megatron_ext.arguments.defaults import iterations_left, running_batch
from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.arguments.validate.training import rampup_reaches_the_batch
from megatron_ext.config import RunConfig


def a_run_has_an_iteration(run: RunConfig, typed: Typed) -> Problems:
    if (
        run.training.train_samples is None
        or run.validation.skip_train
        or any(rampup_reaches_the_batch(run, typed))
    ):
        return
    if not iterations_left(run):
        samples, batch = run.training.train_samples, running_batch(run)
        yield f"--train-samples {samples}: fewer than one global batch of {batch}, so no iteration"


def shares(run: RunConfig) -> list[float]:
    """Shares of training, validation and test set as far as the flags tell; 0 for a missing set."""
    if run.data.is_split:
        try:
            given = [float(share) for share in (run.data.split or "").split(",")]
        except ValueError:
            return [1.0, 1.0, 1.0]  # reported by the rule of --split
        return (given + [0.0, 0.0, 0.0])[:3]
    train = run.data.train_data_path or run.data.data_stages
    paths = (train, run.data.valid_data_path, run.data.test_data_path)
    return [float(bool(path)) for path in paths] if any(paths) else [1.0, 1.0, 1.0]


def there_is_training_data(run: RunConfig, typed: Typed) -> Problems:
    if run.validation.skip_train or shares(run)[0] > 0:
        return
    remedy = "give --train-data-path"
    if run.data.is_split:
        remedy = f"--split {run.data.split!r} leaves none, give other shares"
    yield f"no training data: {remedy}, or --skip-train"


def evaluation_has_something_to_do(run: RunConfig, typed: Typed) -> Problems:
    if not run.validation.skip_train:
        return
    if not run.validation.eval_iters and not run.validation.full_validation:
        yield "--skip-train with --eval-iters 0 does nothing: give --eval-iters above 0, or --full-validation"
    if not any(share > 0 for share in shares(run)[1:]):
        yield "--skip-train: there is no data to evaluate on; give --valid-data-path, or shares of --split"


RULES = (a_run_has_an_iteration, there_is_training_data, evaluation_has_something_to_do)
