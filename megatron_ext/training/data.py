"""The samples of a run: how many it needs, and this rank's stream of microbatches."""

from argparse import Namespace
from collections.abc import Iterator

from megatron.core import parallel_state

from megatron_ext.data import build_data_loader
from megatron_ext.training.batch import needs_data
from megatron_ext.training.errors import RunError


class OutOfData(RunError):
    """The dataset ended before the run did."""


def dataset_sizes(args: Namespace) -> tuple[int, int | None, int | None]:
    """Samples of the training, validation and test sets, counted as Megatron-LM counts them.

    The number enters the index of a dataset (its epochs and shuffles), so it has to be upstream's
    for the same samples to come in the same order (training.py:get_train_valid_test_num_samples).
    """
    train = args.train_samples or args.train_iters * args.global_batch_size
    rounds = args.train_iters // args.eval_interval + 1 if args.eval_interval else 1
    if args.skip_train:
        rounds = 1
    batch = args.eval_iters * args.global_batch_size
    # None draws the whole set once.
    return (train, None, None) if args.full_validation else (train, rounds * batch, batch)


def chunk_iterators(dataset, args: Namespace, consumed_samples: int) -> list[Iterator[dict] | None]:
    """One stream of this rank's microbatches for each of its model chunks; None where none is read.

    The chunks of an interleaved pipeline each read the same microbatches in the same order.

    Call it while nothing is being sent between ranks: the processes that read ahead are forked here,
    not at the first microbatch, and a fork while another thread enters or leaves the interpreter,
    as the threads of an unfinished collective do, can leave the child waiting for a lock for ever.
    """
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if dataset is None:
        return [None] * (stages or 1)
    return [
        _microbatches(dataset, args, consumed_samples) if needs_data(args, stage) else None
        for stage in (range(stages) if stages else [None])
    ]


def _microbatches(dataset, args: Namespace, consumed_samples: int) -> Iterator[dict]:
    """The microbatches from ``consumed_samples`` on; a cyclic loader starts over, another ends."""
    return _in_turn(dataset, args, consumed_samples, iter(build_data_loader(dataset, args, consumed_samples)))


def _in_turn(dataset, args: Namespace, consumed_samples: int, first: Iterator[dict]) -> Iterator[dict]:
    yield from first
    while args.dataloader_type == "cyclic":
        consumed_samples += len(dataset) - consumed_samples % len(dataset)
        yield from build_data_loader(dataset, args, consumed_samples)
    raise OutOfData(
        f"the dataset's {len(dataset)} samples are used up; lower --train-iters or --eval-iters, or add data"
    )
