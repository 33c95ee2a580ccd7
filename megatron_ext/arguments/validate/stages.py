"""Rules of data in stages."""

from collections.abc import Sequence

from megatron_ext.arguments.stages import planned
from megatron_ext.arguments.validate.files import dataset_problems
from megatron_ext.arguments.validate.rule import Problems, Rule, Typed
from megatron_ext.arguments.validate.training import rampup_reaches_the_batch
from megatron_ext.config import RunConfig
from megatron_ext.data.errors import DatasetError
from megatron_ext.data.stages import parse


def file_is_read(run: RunConfig, typed: Typed) -> Problems:
    if run.data.data_stages is not None:
        yield from parse(run.data.data_stages)[1]


def stages_go_with_the_rest(run: RunConfig, typed: Typed) -> Problems:
    if run.data.data_stages is None:
        return
    for given, spelled in (
        (run.rounds.round_index, "--round-index: a round has the samples of one training set"),
        (run.rounds.record_sample_loss, "--record-sample-loss: losses are of one training set"),
        (run.distillation.teacher_logits, "--teacher-logits, which are of one training set"),
        (run.distillation.record_teacher_logits, "--record-teacher-logits, which records one training set"),
        (run.data.dataloader_type == "cyclic", "--dataloader-type cyclic, which has no end"),
    ):
        if given:
            yield f"--data-stages does not go with {spelled}"
    lengths = {stage.seq_length or run.data.seq_length for stage in parse(run.data.data_stages)[0]}
    if len(lengths) > 1 and run.graphs.cuda_graph_impl != "none":
        yield "--data-stages: sequence lengths that change do not go with --cuda-graph-impl"


def stages_follow_each_other(run: RunConfig, typed: Typed) -> Problems:
    """Each has an iteration, and its sources' tokens fit into it."""
    if run.data.data_stages is None or (run.training.train_iters or run.training.train_samples) is None:
        return
    if any(rampup_reaches_the_batch(run, typed)):
        return
    stages, problems = parse(run.data.data_stages)
    if problems:
        return
    try:
        for each in planned(stages, run):
            each.of(run)
    except DatasetError as error:
        yield f"--data-stages {run.data.data_stages}: {error}"


RULES_OF_THE_FILE = (file_is_read,)
RULES = (*RULES_OF_THE_FILE, stages_go_with_the_rest, stages_follow_each_other)


def of_each_length(rules: Sequence[Rule], run: RunConfig, typed: Typed, found: Sequence[str]) -> Problems:
    """What other rules say of the sequence lengths of the stages, but not of --seq-length."""
    if run.data.data_stages is None:
        return
    for stage in parse(run.data.data_stages)[0]:
        if stage.seq_length in (None, run.data.seq_length):
            continue
        there = run.but(seq_length=stage.seq_length)
        for problem in (problem for rule in rules for problem in rule(there, typed)):
            if problem not in found:
                yield f"--data-stages {run.data.data_stages}: stage {stage.name}: {problem}"


def sources_exist(run: RunConfig, typed: Typed) -> Problems:
    if run.data.data_stages is None:
        return
    for stage in parse(run.data.data_stages)[0]:
        for source in stage.blend:
            flag = f"--data-stages {run.data.data_stages}: stage {stage.name}:"
            yield from dataset_problems(flag, source.prefix)


RULES_OF_THIS_MACHINE = (sources_exist,)
