"""The current round of a run, and the samples of that round."""

from megatron_ext.config import RunConfig
from megatron_ext.data import DatasetError, build_datasets
from megatron_ext.data.identity import identify, probe, require_same
from megatron_ext.data.rounds.dataset import RoundDataset, RoundIndex, read_round
from megatron_ext.data.views import Chained, Samples
from megatron_ext.platform.collective import on_every_rank, on_first_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training.data import Datasets, dataset_sizes, print_data_summary, samples_to_read
from megatron_ext.training.state import Progress


def open_round(run: RunConfig, tokenizer: Tokenizer) -> RoundIndex | None:
    """Read the index of ``--round-index`` and check it against the flags; None without one.

    Raises:
        DatasetError: on every rank, if it is damaged or belongs to another training set.
    """
    if (path := run.rounds.round_index) is None:
        return None
    index = on_every_rank(lambda: read_round(path))

    def check() -> None:
        described = index.manifest["dataset"]
        if described is None:
            print_rank_0(
                f"WARNING: --round-index {index.path} was made from plain losses: that it belongs to this "
                "training set cannot be checked"
            )
            return
        ours = identify(run, tokenizer, index.manifest["samples"])
        require_same(described, ours, f"--round-index {index.path}", _ADVICE)

    on_first_rank(check)
    return index


_ADVICE = "Train with the data flags and the seed of the run that was recorded, or build a round for this one"


def enter_round(
    progress: Progress, loaded_from: str | None, index: RoundIndex | None, run: RunConfig
) -> bool:
    """Note in ``progress`` the current round and the number of samples consumed before it.

    Returns whether the run begins the round.

    Args:
        progress: that of the loaded checkpoint, or of a new run.
        loaded_from: the folder that the progress was loaded from; None for a new run.

    Raises:
        DatasetError: the checkpoint is of another round, and no flag asks to continue from it.
    """
    ours = None if index is None else index.manifest["sha256"]
    if loaded_from is not None and progress.round_sha256 == ours:
        return False
    if loaded_from is not None and index is None:
        raise DatasetError(
            f"the checkpoint in {loaded_from} was made in a round: give its --round-index, or --finetune to "
            "take its weights alone"
        )
    if loaded_from is not None and index is not None and run.rounds.round_schedule == "restart":
        raise DatasetError(
            f"the checkpoint in {loaded_from} is not of the round {index.path}. To begin the round from its "
            f"weights: --pretrained-checkpoint {loaded_from}, with a folder of the round's own in --load and "
            "--save; to go on with its iteration and learning rate: --round-schedule continue"
        )
    progress.round_sha256, progress.round_start = ours, progress.consumed_train_samples
    if index is not None:
        print_rank_0(
            f" round {index.manifest['round']}: {len(index.ids):,} of {index.manifest['samples']:,} samples, "
            f"from iteration {progress.iteration}"
        )
        if len(index.ids) < run.training.global_batch_size:
            print_rank_0(
                f"WARNING: these are fewer than one --global-batch-size {run.training.global_batch_size}: a "
                "batch holds samples more than once"
            )
    return True


def build_round_datasets(
    run: RunConfig, tokenizer: Tokenizer, progress: Progress, index: RoundIndex | None
) -> Datasets:
    """(train, valid, test) as from build_datasets, with the round's samples as the training set.

    The order of the samples depends on the number that the set is shuffled for: it is always the number at
    the start of the run, or in the first round, whatever the length of this run.

    Raises:
        DatasetError: on every rank; also if the samples are not those that were recorded.
    """
    _, *others = dataset_sizes(run.training, run.validation)
    if run.validation.skip_train:
        datasets = build_datasets(run, tokenizer, (0, *others))
        print_data_summary(datasets, 0, run)
        return datasets
    assert progress.training_set is not None  # set by settle
    drawn, wanted = progress.training_set["samples"], samples_to_read(progress, run)
    train, *rest = build_datasets(run, tokenizer, (drawn, *others))
    if index is None:
        train = _extended(train, drawn, wanted, run, tokenizer)
        print_data_summary((train, *rest), wanted, run)
        return train, *rest

    def check() -> None:
        if len(train) < drawn:
            raise DatasetError(
                f"--round-index {index.path}: is of {drawn:,} samples, the training set has {len(train):,}"
            )
        described = index.manifest["dataset"]
        if described is not None:
            ours = {"probe": probe(train, drawn)}
            require_same(described, ours, f"--round-index {index.path}", _ADVICE)

    on_first_rank(check)
    print_data_summary((None, *rest), 0, run)
    return RoundDataset(train, index, wanted, run.init.seed), *rest


def _extended(train: Samples, drawn: int, wanted: int, run: RunConfig, tokenizer: Tokenizer) -> Samples:
    """Extend a training set to at least ``wanted`` samples, with further shuffles of the same data.

    Megatron-Core shuffles all epochs together: with one more epoch, samples that were already read would
    appear again, and others never. Each further shuffle has its own seed and twice as many samples, so the
    order does not depend on the final length of the run.
    """
    parts, more = [train], drawn
    while sum(map(len, parts)) < wanted and run.data.dataloader_type != "cyclic":
        again = run.but(seed=run.init.seed + len(parts))
        parts.append(build_datasets(again, tokenizer, (more, 0, 0))[0])
        more *= 2
    return train if len(parts) == 1 else Chained(parts)
