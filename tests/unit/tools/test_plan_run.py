"""tools/plan_run.py: whether a run fits, and what would."""

import importlib.util
import json

from tests.conftest import REPOSITORY

SPEC = importlib.util.spec_from_file_location("plan_run", REPOSITORY / "tools" / "plan_run.py")
plan_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan_run)

RUN = (
    "--model-preset pangu-pi-7b --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 100000 "
    "--lr 1e-4 --train-iters 10 --global-batch-size 64 --micro-batch-size"
).split()


def plan(capsys, *options: str, flags: list[str]) -> tuple[int, dict]:
    code = plan_run.main(["--json", *options, "--", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_what_does_not_fit_gets_suggestions_that_do(capsys):
    code, summary = plan(capsys, "--world-size", "8", flags=[*RUN, "8"])
    assert code == 1 and not summary["fits"]
    code, summary = plan(capsys, "--world-size", "8", "--suggest", flags=[*RUN, "8"])
    assert code == 0
    best = summary["suggestions"][0]
    flags = [*RUN, "8", *best["flags"].split()]
    code, summary = plan(capsys, "--world-size", "8", flags=[*flags, "--overlap-grad-reduce"])
    assert code == 0 and summary["fits"]
    assert sum(summary["step_seconds"].values()) == best["seconds"]
    assert sum(summary["memory_bytes"].values()) == best["memory_bytes"]


def test_measured_speeds_are_taken(capsys):
    _, slow = plan(capsys, "--matmul-tflops", "1", flags=[*RUN, "1"])
    _, fast = plan(capsys, "--matmul-tflops", "2", flags=[*RUN, "1"])
    assert slow["step_seconds"]["computation"] == 2 * fast["step_seconds"]["computation"]


def test_text_names_every_part(capsys):
    assert plan_run.main(["--suggest", "--machine", "h200", "--world-size", "8", "--", *RUN, "1"]) == 0
    text = capsys.readouterr().out
    for words in ("every flag is understood", "optimizer", "tokens/s per device", "layouts that fit", "  1."):
        assert words in text


def test_a_teacher_is_said_not_to_be_counted(capsys):
    plan_run.main(["--world-size", "8", "--", *RUN, "1", "--teacher-load", "big"])
    assert "the teacher of --teacher-load big is not counted" in capsys.readouterr().out


def test_trace_stands_beside_the_arithmetic(capsys):
    flags = [*RUN, "1", "--num-layers", "2", "--pipeline-model-parallel-size", "2"]
    _, summary = plan(capsys, "--world-size", "4", "--trace", flags=flags)
    found = summary["trace"]
    assert found["rank"] == 2 * found["stage"]  # the stage whose memory is told
    assert found["arithmetic"]["memory_bytes"] == summary["memory_bytes"]
    assert found["trace"]["parameters"] == found["arithmetic"]["parameters"]
    assert found["trace"]["flops"] == found["arithmetic"]["flops"]
    assert found["groups"]["pipeline"] == [0, 2]


def test_trace_of_no_rank_or_of_a_cpu_is_refused(capsys):
    assert plan_run.main(["--world-size", "4", "--trace", "4", "--", *RUN, "1"]) == 2
    assert "the ranks are 0 to 3" in capsys.readouterr().err
    assert plan_run.main(["--machine", "cpu", "--trace", "--", *[f for f in RUN if f != "--bf16"], "1"]) == 2
    assert "give another --machine" in capsys.readouterr().err


def test_without_triton_more_is_kept(capsys):
    _, fused = plan(capsys, flags=[*RUN, "1"])
    _, plain = plan(capsys, "--without-triton", flags=[*RUN, "1"])
    assert plain["memory_bytes"]["activations"] > 1.2 * fused["memory_bytes"]["activations"]
