"""Rules against a run of nothing: no iteration, no training data, nothing to evaluate."""

from megatron_ext.arguments.derive import iterations_left, running_batch
from megatron_ext.arguments.validate.run import rampup_reaches_the_batch


def a_run_has_an_iteration(args, typed):
    if args.train_samples is None or args.skip_train or any(rampup_reaches_the_batch(args, typed)):
        return
    if not iterations_left(args):
        batch = running_batch(args)
        yield f"--train-samples {args.train_samples}: fewer than one global batch of {batch}, so no iteration"


def shares(args) -> list[float]:
    """Of training, validation and test, above 0 where there is such a set; as far as the flags alone tell."""
    if args.data_path or args.data_args_path:
        try:
            given = [float(share) for share in (args.split or "").split(",")]
        except ValueError:
            return [1.0, 1.0, 1.0]  # reported by the rule of --split
        return (given + [0.0, 0.0, 0.0])[:3]
    paths = (args.train_data_path, args.valid_data_path, args.test_data_path)
    return [float(bool(path)) for path in paths] if any(paths) else [1.0, 1.0, 1.0]


def there_is_training_data(args, typed):
    if args.skip_train or shares(args)[0] > 0:
        return
    remedy = "give --train-data-path"
    if args.data_path or args.data_args_path:
        remedy = f"--split {args.split!r} leaves none, give other shares"
    yield f"no training data: {remedy}, or --skip-train"


def evaluation_has_something_to_do(args, typed):
    if not args.skip_train:
        return
    if not args.eval_iters and not args.full_validation:
        yield "--skip-train with --eval-iters 0 does nothing: give --eval-iters above 0, or --full-validation"
    if not any(share > 0 for share in shares(args)[1:]):
        yield "--skip-train: there is no data to evaluate on; give --valid-data-path, or shares of --split"


RULES = (a_run_has_an_iteration, there_is_training_data, evaluation_has_something_to_do)
