"""Each rule: a command line that breaks only it is refused with one sentence that names the flag."""

import pytest

from megatron_ext.arguments.parser import CommandLineError, read_args

SHAPE = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
TOKENS = "--tokenizer-type NullTokenizer --vocab-size 99"
ITERATIONS = "--lr 1e-3 --train-iters 10 --micro-batch-size 2"
SAMPLES = "--lr 1e-3 --train-samples 64 --micro-batch-size 2"
BASE = f"{SHAPE} {TOKENS} {ITERATIONS} --mock-data"
IN_SAMPLES = f"{SHAPE} {TOKENS} {SAMPLES} --mock-data"
PIPELINE = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"


def problems_of(line: str, world_size: int = 1, device: str = "cpu") -> list[str]:
    try:
        read_args(line.split(), world_size=world_size, device=device)
    except CommandLineError as error:
        return error.problems
    return []


def test_the_bases_are_valid():
    for line in (BASE, IN_SAMPLES):
        assert problems_of(line) == []


#: (flags added to BASE, processes, part of the one problem)
BROKEN = [
    ("--skip-train --eval-iters 0", 1, "--skip-train with --eval-iters 0 does nothing"),
    ("--tensor-model-parallel-size 2", 3, "the 3 processes cannot be divided into models of 2"),
    ("--tensor-model-parallel-size 8", 8, "--num-attention-heads 4 is not divisible"),
    ("--pipeline-model-parallel-size 3", 3, "--num-layers 8 is not divisible"),
    ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 8", 2, "leave 0 layers for 1"),
    ("--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 3", 4, "leave 5 layers for 3"),
    ("--num-layers-per-virtual-pipeline-stage 2", 1, "needs --pipeline-model-parallel-size 2 or more"),
    (f"{PIPELINE} --global-batch-size 2", 2, "at most the 1 of a step"),
    (f"{PIPELINE} --global-batch-size 6", 2, "the 3 micro batches of a step must be a multiple"),
    (f"{PIPELINE} --global-batch-size 4 --no-overlap-p2p-communication", 2, "-size 3 or more"),
    (f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4", 2, "exclude each other"),
    (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 4",
        2,
        "4",
    ),
    ("--group-query-attention --num-query-groups 3", 1, "--num-query-groups 3"),
    ("--num-query-groups 2", 1, "--num-query-groups cannot take effect: needs --group-query-attention"),
    (
        "--normalization RMSNorm --qk-layernorm --qk-layernorm-across-heads --group-query-attention "
        "--num-query-groups 1 --tensor-model-parallel-size 2",
        2,
        "--qk-layernorm-across-heads needs as many query groups (1) as --tensor-model-parallel-size 2",
    ),
    ("--qk-layernorm-across-heads", 1, "cannot take effect: needs --qk-layernorm"),
    ("--no-rope-freq 4", 1, "cannot take effect: needs --position-embedding-type rope"),
    ("--window-attn-skip-freq 4", 1, "cannot take effect: needs --window-size"),
    ("--window-size 8", 1, "--window-size 8: give LEFT,0"),
    ("--window-size a,b", 1, "'a,b' is not LEFT,RIGHT, such as 511,0"),
    (
        "--norm-placement output --recompute-granularity selective --recompute-modules layernorm",
        1,
        "--recompute-modules layernorm has no effect with --norm-placement output",
    ),
    ("--num-attention-heads 6", 1, "--hidden-size 64 is not divisible by --num-attention-heads 6"),
    ("--tensor-model-parallel-size 2 --ffn-hidden-size 33", 2, "--ffn-hidden-size 33 is not divisible"),
    ("--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31", 2, "--seq-length 31"),
    ("--seq-length 64", 1, "--max-position-embeddings 32 must be at least --seq-length 64"),
    ("--context-parallel-size 2", 2, "--context-parallel-size above 1 needs --transformer-impl"),
    ("--expert-model-parallel-size 2", 2, "--expert-model-parallel-size"),
    ("--global-batch-size 3", 1, "--global-batch-size 3 is not divisible"),
    ("--train-samples 7", 1, "--train-iters and --train-samples exclude each other"),
    ("--lr-decay-samples 7", 1, "--lr-decay-samples cannot go with --train-iters"),
    (
        "--rampup-batch-size 2 2 8 --global-batch-size 4",
        1,
        "--rampup-batch-size cannot go with --train-iters",
    ),
    ("--lr-warmup-fraction .1 --lr-warmup-iters 2", 1, "--lr-warmup-fraction and --lr-warmup-iters exclude"),
    ("--lr-warmup-iters 10", 1, "the warm-up of 10 must be shorter"),
    ("--min-lr 1", 1, "--min-lr 1.0 must not exceed --lr"),
    ("--lr-decay-style WSD", 1, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 11", 1, "exceeds the schedule of 10"),
    ("--lr-wsd-decay-iters 3", 1, "--lr-wsd-decay-iters cannot take effect: needs --lr-decay-style WSD"),
    ("--start-weight-decay .1", 1, "--start-weight-decay cannot take effect"),
    ("--weight-decay-incr-style linear --start-weight-decay .1", 1, "needs --end-weight-decay"),
    ("--optimizer muon --muon-tp-mode distributed", 1, "--muon-tp-mode distributed is not supported here"),
    ("--adam-beta1 .8 --optimizer sgd", 1, "--adam-beta1 cannot take effect"),
    ("--adam-beta2 1", 1, "--adam-beta2 1.0: must be at least 0 and below 1"),
    ("--lr nan", 1, "--lr nan"),
    ("--micro-batch-size 0", 1, "--micro-batch-size 0: must be at least 1"),
    ("--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", 1, "exclude each other"),
    ("--fp16", 1, "--fp16 needs a GPU"),
    ("--loss-scale 8", 1, "--loss-scale cannot take effect: needs --fp16"),
    ("--fp8-format hybrid", 1, "--fp8-format needs --transformer-impl transformer_engine"),
    ("--fp8-recipe tensorwise", 1, "--fp8-recipe cannot take effect: needs --fp8-format"),
    ("--transformer-impl transformer_engine", 1, "transformer_engine: it needs a GPU"),
    ("--attention-backend flash", 1, "--attention-backend flash cannot take effect"),
    ("--series-activation-order 2", 1, "add --swiglu"),
    ("--augmented-shortcuts 1 --augmented-shortcut-reduction 24", 1, "is not divisible by --augmented"),
    ("--pangu-init random", 1, "--pangu-init cannot take effect"),
    ("--swiglu --squared-relu", 1, "--swiglu and --squared-relu exclude each other"),
    ("--position-embedding-type mrope", 1, "mrope is not supported here"),
    ("--rotary-base 500", 1, "--rotary-base cannot take effect"),
    ("--use-rope-scaling", 1, "--use-rope-scaling cannot take effect"),
    ("--rope-scaling-factor 32", 1, "--rope-scaling-factor cannot take effect: needs --use-rope-scaling"),
    (
        "--position-embedding-type rope --use-rope-scaling --rope-scaling-factor 0",
        1,
        "--rope-scaling-factor 0.0",
    ),
    ("--overlap-param-gather --overlap-grad-reduce", 1, "needs --use-distributed-optimizer"),
    ("--overlap-param-gather --use-distributed-optimizer", 1, "needs --overlap-grad-reduce"),
    ("--recompute-granularity full --recompute-method block", 1, "needs --recompute-num-layers"),
    ("--recompute-activations --recompute-method block", 1, "--recompute-method cannot take effect"),
    ("--recompute-activations --recompute-modules moe", 1, "--recompute-modules moe: choose from"),
    ("--distributed-backend nccl", 1, "--distributed-backend nccl needs GPUs"),
    ("--save-interval 5", 1, "--save-interval cannot take effect: needs --save"),
    ("--ckpt-step 5", 1, "--ckpt-step cannot take effect: needs --load"),
    ("--ckpt-format torch", 1, "--ckpt-format torch is not supported here"),
    ("--load x --dist-ckpt-strictness raise_all", 1, "--dist-ckpt-strictness raise_all is not supported"),
    ("--dataloader-type external", 1, "--dataloader-type external"),
    ("--split 1,2,3,4", 1, "--split '1,2,3,4'"),
    ("--split 0,0,0", 1, "--split '0,0,0'"),
    ("--tokenizer-type GPT2BPETokenizer", 1, "--tokenizer-type GPT2BPETokenizer is not supported here"),
    ("--tokenizer-model x.model", 1, "--tokenizer-model cannot take effect"),
    ("--exit-signal SIGKILL", 1, "--exit-signal SIGKILL"),
    ("--cross-entropy-loss-fusion", 1, "it goes with --bf16 only"),
    ("--cross-entropy-loss-fusion --bf16 --deterministic-mode", 1, "is not deterministic"),
    ("--profile --profile-step-end 5", 1, "--profile-step-end 5 must be above"),
    ("--profile-ranks 1", 1, "--profile-ranks cannot take effect: needs --profile"),
    ("--manual-gc-interval 5", 1, "--manual-gc-interval cannot take effect: needs --manual-gc"),
    ("--tensorboard-queue-size 5", 1, "needs --tensorboard-dir"),
    ("--wandb-exp-name x", 1, "needs --wandb-project"),
    ("--empty-unused-memory-level 1", 1, "needs a GPU"),
]


@pytest.mark.parametrize(("flags", "world_size", "expected"), BROKEN)
def test_each_rule_is_broken_alone(flags, world_size, expected):
    problems = problems_of(f"{BASE} {flags}", world_size)
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 2", 3),
        (f"{PIPELINE} --global-batch-size 8", 2),
        (f"{PIPELINE} --global-batch-size 16", 4),
        ("--pipeline-model-parallel-size 2 --num-layers 7 --account-for-loss-in-pipeline-split", 2),
        ("--group-query-attention --num-query-groups 1 --tensor-model-parallel-size 4", 4),
        ("--swiglu --series-activation-order 3 --augmented-shortcuts 2", 1),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-wsd-decay-style cosine", 1),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 2", 1),
        ("--use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce", 2),
        ("--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion", 1),
        ("--no-rope-fusion --no-bias-swiglu-fusion --no-persist-layer-norm --use-cpu-initialization", 1),
        ("--use-mcore-models --use-flash-attn --attention-softmax-in-fp32", 1),
        ("--bf16 --accumulate-allreduce-grads-in-fp32", 1),
    ],
)
def test_what_megatron_users_type_is_accepted(flags, world_size):
    assert problems_of(f"{BASE} {flags}", world_size) == []


def test_gpu_flags_are_checked_for_a_gpu():
    line = f"{BASE} --bf16 --fp8-format hybrid --context-parallel-size 2 --attention-backend flash"
    assert problems_of(line, 2, "cuda") == []
    assert len(problems_of(line, 2, "cpu")) == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--rampup-batch-size 4 3 32 --global-batch-size 8", "does not reach --global-batch-size 8"),
        ("--rampup-batch-size 8 2 32 --global-batch-size 8", "does not reach --global-batch-size 8"),
        ("--rampup-batch-size 1 1 32 --global-batch-size 8", "must be divisible by --micro-batch-size"),
        ("--lr-warmup-iters 3", "--lr-warmup-iters cannot go with --train-samples"),
        ("--lr-decay-style WSD", "needs --lr-wsd-decay-samples"),
        ("--global-batch-size 66", "--train-samples 64: fewer than one global batch of 66, so no iteration"),
    ],
)
def test_runs_in_samples(flags, expected):
    (problem,) = problems_of(f"{IN_SAMPLES} {flags}")
    assert expected in problem


def test_required_flags_are_named():
    problems = "\n".join(problems_of(""))
    for name in ("--num-layers", "--hidden-size", "--micro-batch-size", "data is", "--tokenizer-type"):
        assert f"{name} is required" in problems or f"{name} required" in problems
    assert "--lr is required" in "\n".join(problems_of(BASE.replace("--lr 1e-3", "")))
    assert problems_of(BASE.replace("--train-iters 10", "")) == [
        "--train-iters or --train-samples is required"
    ]


class TestFiles:
    """Data, tokenizers and folders of this machine."""

    DATA = BASE.replace("--mock-data", "")

    @pytest.fixture
    def prefix(self, tmp_path):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"one_text_document{suffix}").touch()
        return str(tmp_path / "one_text_document")

    def test_datasets_that_are_there(self, prefix, capsys):
        assert problems_of(f"{self.DATA} --data-path 0.3 {prefix} 7 {prefix}") == []
        assert "969, 30, 1" in capsys.readouterr().err
        assert problems_of(f"{self.DATA} --train-data-path {prefix} --valid-data-path {prefix}") == []

    def test_a_dataset_that_is_not_there_gets_a_hint(self, prefix):
        (problem,) = problems_of(f"{self.DATA} --data-path {prefix.removesuffix('_text_document')}")
        assert f"did you mean {prefix}?" in problem
        (problem,) = problems_of(f"{self.DATA} --data-path {prefix}.bin")
        assert f"did you mean {prefix}?" in problem

    def test_blends_need_a_weight_for_each(self, prefix):
        for blend in (f"0.3 {prefix} 0.7", f"0.3 {prefix} {prefix} 0.7"):
            assert len(problems_of(f"{self.DATA} --data-path {blend}")) == 1

    def test_data_is_given_once(self, prefix):
        (problem,) = problems_of(f"{BASE} --data-path {prefix}")
        assert problem == "--data-path and --mock-data exclude each other: give the data once"

    def test_split_is_of_data_path(self, prefix):
        (problem,) = problems_of(f"{self.DATA} --train-data-path {prefix} --split 9,1,0")
        assert "--split cannot take effect" in problem

    def test_there_is_data_to_train_on(self, prefix):
        """Or to evaluate, with --skip-train."""
        (problem,) = problems_of(f"{self.DATA} --valid-data-path {prefix}")
        assert problem == "no training data: give --train-data-path, or --skip-train"
        (problem,) = problems_of(f"{self.DATA} --data-path {prefix} --split 0,50,50")
        assert problem.startswith("no training data: --split '0,50,50' leaves none")
        for data in (f"--valid-data-path {prefix}", f"--data-path {prefix} --split 0,1,0"):
            assert problems_of(f"{self.DATA} {data} --skip-train") == []
        for data in (f"--train-data-path {prefix}", f"--data-path {prefix} --split 100"):
            (problem,) = problems_of(f"{self.DATA} {data} --skip-train")
            assert problem.startswith("--skip-train: there is no data to evaluate on")

    def test_tokenizer_file(self, tmp_path):
        line = BASE.replace(TOKENS, f"--tokenizer-type Llama2Tokenizer --tokenizer-model {tmp_path}/no.model")
        (problem,) = problems_of(line)
        assert problem.startswith(f"--tokenizer-model {tmp_path}/no.model: there is no such file")

    def test_seeds_and_heads_that_libraries_refuse_later(self):
        (problem,) = problems_of(f"{BASE} --seed {2**31}")
        assert problem.startswith(f"--seed {2**31}: must be between 0 and ")
        assert problems_of(f"{BASE} --seed {2**31 - 1}") == []
        (problem,) = problems_of(f"{BASE} --position-embedding-type rope --kv-channels 15")
        assert problem.startswith("--kv-channels 15: rotary embeddings turn pairs")
        assert (
            problems_of(f"{BASE} --position-embedding-type rope --kv-channels 15 --rotary-percent 0.5") == []
        )
        assert problems_of(f"{BASE} --position-embedding-type none --kv-channels 15") == []

    def test_metrics_are_appended_to_metrics(self, tmp_path):
        """A metrics file is appended to and its incomplete end cut off: others must not be taken for one."""
        path = tmp_path / "metrics.jsonl"
        for content in ("", '{"iter', '{"iteration": 1, "lm_loss": 2.0}\n{"iterat'):
            path.write_text(content)
            assert problems_of(f"{BASE} --metrics-file {path}") == []
        for content in (b'{"text": "a corpus"}\n', b"\x12\x00\x34", b"100", b"\n"):
            path.write_bytes(content)
            (problem,) = problems_of(f"{BASE} --metrics-file {path}")
            assert problem.startswith(f"--metrics-file {path}: holds something else than metrics")

    def test_save_folder(self, tmp_path):
        (tmp_path / "file").touch()
        assert problems_of(f"{BASE} --save {tmp_path}/a/b --save-interval 5") == []
        assert not (tmp_path / "a").exists()
        assert problems_of(f"{BASE} --save {tmp_path}/a") == ["--save needs --save-interval"]
        (problem,) = problems_of(f"{BASE} --save {tmp_path}/file/x --save-interval 5")
        assert "is a file, not a folder" in problem
        (problem,) = problems_of(f"{BASE} --save /proc/x --save-interval 5")
        assert "--save /proc/x: cannot be written" in problem

    def test_retained_checkpoints_are_saved_ones(self, tmp_path):
        (problem,) = problems_of(f"{BASE} --save {tmp_path} --save-interval 5 --save-retain-interval 7")
        assert "must be a multiple of" in problem
