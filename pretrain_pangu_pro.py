"""Pretrain PanGu-pi Pro with tensor, pipeline and data parallelism.

    torchrun --nproc-per-node 2 pretrain_pangu_pro.py --tensor-model-parallel-size 2 \\
        --model-preset tiny --data-path my_text_document --tokenizer-type SentencePieceTokenizer \\
        --tokenizer-model my.model --micro-batch-size 4 --train-iters 500 --lr 1e-3 --save checkpoints \\
        --save-interval 100

Flags are Megatron-LM's; see --help. One process needs no torchrun. Runs on GPUs where torch sees
some, else on the CPU with the same parallelism over gloo.
"""

import os
import signal
import sys
import time

START = time.time()

from megatron_ext.common import command  # noqa: E402
from megatron_ext.common.errors import Interrupted, LostProcess  # noqa: E402
from megatron_ext.training.side import report, steady_streams  # noqa: E402
from megatron_ext.training.signals import StopSignals  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Parse, build and train; or record what a trained model predicts."""
    with steady_streams(), StopSignals() as signals:
        train(argv, signals)


def train(argv: list[str] | None, signals: StopSignals) -> None:
    """Train or record, with stop signals handled by ``signals``."""
    from megatron_ext.arguments import parse_args

    run = parse_args(argv)
    signals.answer(run.training.exit_signal)

    # Imported after the flags are validated: these take seconds.
    from megatron_ext.checkpoint import only_recording_in, only_run_in
    from megatron_ext.platform.collective import print_rank_0
    from megatron_ext.training import distributed
    from megatron_ext.training.recording import record_training_set
    from megatron_ext.training.setup import build_trainer
    from megatron_ext.training.teacher_recording import record_teacher_targets
    from megatron_ext.training.watchdog import watching

    store, losses = distributed.rendezvous_store(run.process), run.rounds.record_sample_loss
    targets = run.distillation.record_teacher_logits
    with watching(run.process, store) as watchdog:
        distributed.initialize(run, store)
        frozen = losses and run.rounds.record_mode == "frozen"
        saves = None if frozen or targets else run.checkpoint.save  # a recording reads checkpoints alone
        with (
            only_recording_in(losses),
            only_recording_in(targets, "--record-teacher-logits"),
            only_run_in(saves),
        ):
            if frozen:
                record_training_set(run, watchdog, signals)
            elif targets:
                record_teacher_targets(run, watchdog, signals)
            else:
                trainer = build_trainer(run)
                print_rank_0(f" set up in {time.time() - START:.1f} s")
                distributed.shorten_timeout(run.process)
                trainer.train(watchdog, signals)
    distributed.finalize()


def leave(error: BaseException, code: int) -> None:
    """Exit at once: an ordinary exit closes process groups, which may wait for lost processes."""
    report(f"pretrain_pangu_pro.py: error: {error}")
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except LostProcess as error:
        leave(error, 1)
    except Interrupted as error:
        leave(error, error.code)
    except command.EXPECTED as error:
        sys.exit(f"pretrain_pangu_pro.py: error: {command.message(error)}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Python's shutdown is interrupted
