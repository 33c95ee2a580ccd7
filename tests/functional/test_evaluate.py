"""tools/evaluate.py: what the harness says of the exported model, at every layout, after any kill."""

import gzip
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval (extra eval)")
toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")

from megatron_ext.evaluation.documents import EvaluationError, documents  # noqa: E402
from megatron_ext.evaluation.forms import item_of  # noqa: E402
from megatron_ext.harness import results  # noqa: E402
from megatron_ext.harness.loaded_tasks import loaded_tasks, silent_hub  # noqa: E402
from megatron_ext.harness.options import EvaluateOptions  # noqa: E402
from megatron_ext.harness.run import evaluate  # noqa: E402
from megatron_ext.interchange.export import export_folder  # noqa: E402
from megatron_ext.interchange.open import open_source  # noqa: E402
from megatron_ext.interchange.tokenizer_files import of_path  # noqa: E402
from tests.helpers import benchmarks  # noqa: E402
from tests.helpers.pool import WorkerError  # noqa: E402
from tests.unit.tokenizer.sample_models import trained  # noqa: E402

LONG = bool(os.environ.get("LONG_TESTS"))
POSITIONS = 512 if LONG else 96  # some questions are longer
WITHOUT_PI = dict(series_activation_order=0, augmented_shortcuts=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return benchmarks.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (checkpoint, its Hugging Face folder), with the pi modules and without."""
    base = tmp_path_factory.mktemp("models")
    (base / "small.model").write_bytes(trained())
    tokenizer = of_path(base / "small.model")
    made = {}
    for kind, changes in {"pi": {}, "plain": WITHOUT_PI}.items():
        model = toys.pi_model(
            vocab_size=tokenizer.size, padded_vocab_size=1024, max_position_embeddings=POSITIONS, **changes
        )
        load = toys.checkpoint(base / kind, model, tokenizer)
        source = open_source(load)
        folder = export_folder(
            base / f"{kind}_hf", source.model, source.dtype, source.get, tokenizer=source.tokenizer
        )
        made[kind] = load, folder
    return made


def answers(found: dict) -> dict[str, list]:
    """Task -> item -> [log-likelihood, greedy] of each choice."""
    return {name: [item["answers"] for item in task["samples"]] for name, task in found["tasks"].items()}


def assert_same(found: dict[str, list], wanted: dict[str, list]) -> None:
    """To 1e-4, or two units of the last digit of fp32, in which the harness's model adds up."""
    assert found.keys() == wanted.keys()
    for name, items in wanted.items():
        assert len(found[name]) == len(items)
        for ours, theirs in zip(found[name], items, strict=True):
            assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-4, rel=2.4e-7)
            assert [one[1] for one in ours] == [one[1] for one in theirs]


def stock(options: EvaluateOptions) -> dict:
    """The same tasks by the harness's own class for transformers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=str(options.load), trust_remote_code=True, dtype="float32", device="cpu", batch_size=4
    )
    tasks = loaded_tasks(options)
    found = evaluator.evaluate(model, {"tasks": tasks}, limit=options.limit, bootstrap_iters=0)
    return found


@pytest.mark.parametrize("kind", ["pi", "plain"])
def test_equals_stock_harness_at_every_layout(pool, folders, data, kind, request):
    """A few items of made text; LONG_TESTS=1: 600 of two benchmarks."""
    pytest.importorskip("accelerate", reason="lm_eval's own model needs accelerate")
    load, folder = folders[kind]
    data_dir = request.getfixturevalue("shared") / "data/eval" if LONG else data
    options = dict(
        tasks=["cmmlu_cloze", "c3_letters"], data_dir=str(data_dir), limit=300 if LONG else 8, num_fewshot=1
    )
    theirs = stock(EvaluateOptions(load=str(folder), **options))
    wanted = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in theirs["samples"].items()
    }
    layouts = [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {}),
    ]
    for processes, layout in layouts:
        for found in pool.run(
            processes, evaluate, EvaluateOptions(load=str(load), **options, **layout), True, timeout=600
        ):
            assert_same(answers(found), wanted)
            for name, task in found["tasks"].items():
                assert 0 < task["truncated"] <= task["items"]  # questions, each of which is several requests
                subjects = [item["subject"] for item in task["samples"]]
                assert len(set(subjects)) > 1
                for metric, number in task["metrics"].items():
                    value = theirs["results"][name][f"{metric},none"]
                    assert number["value"] == pytest.approx(value, abs=1e-5)
    from_folder = pool.run(1, evaluate, EvaluateOptions(load=str(folder), **options), True)[0]
    assert_same(answers(from_folder), wanted)


def test_examples_are_of_the_same_subject(data):
    task = loaded_tasks(EvaluateOptions(load="x", tasks=["cmmlu_cloze"], data_dir=str(data), num_fewshot=2))
    task = task["cmmlu_cloze"]
    dev = documents("cmmlu", data, "dev")
    for doc in list(task.test_docs())[:4]:
        first, second = [one for one in dev if one.subject == doc["subject"]][:2]
        shown = [item_of(one, "cloze") for one in (first, second)]
        examples = "".join(f"{one.query}{one.choices[one.gold]}\n\n" for one in shown)
        assert task.fewshot_context(doc, 2) == examples + doc["query"]


def test_folder_whose_tokenizer_begins_texts(folders, data, tmp_path, pool):
    """As Llama's puts <s> in front of every text."""
    pytest.importorskip("accelerate", reason="lm_eval's own model needs accelerate")
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = Path(shutil.copytree(folders["plain"][1], tmp_path / "hf"))
    (folder / "checksums.json").unlink()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    options = EvaluateOptions(load=str(folder), tasks=["piqa_cloze"], data_dir=str(data), limit=6)
    wanted = [sample["filtered_resps"] for sample in stock(options)["samples"]["piqa_cloze"]]
    assert_same(answers(pool.run(1, evaluate, options, True)[0]), {"piqa_cloze": wanted})
    without = EvaluateOptions(**vars(options) | {"load": str(folders["plain"][1])})
    assert answers(pool.run(1, evaluate, without, True)[0])["piqa_cloze"][0] != wanted[0]


def test_killed_and_started_again_gives_the_same(pool, folders, data, tmp_path):
    """Whatever of the file of scores a kill leaves, even half a line."""
    load, _ = folders["pi"]
    options = EvaluateOptions(
        load=str(load),
        tasks=["piqa", "eprstmt"],
        data_dir=str(data),
        output=str(tmp_path),
        tokens_at_once=128,
    )
    whole = pool.run(2, evaluate, options, True)[0]
    content = (tmp_path / "scores.jsonl").read_bytes()
    results = (tmp_path / "results.json").read_bytes()
    for kept in (0, len(content) // 3, len(content) * 2 // 3, len(content)):
        (tmp_path / "scores.jsonl").write_bytes(content[:kept] + b'{"key": "torn')
        assert answers(pool.run(2, evaluate, options, True)[0]) == answers(whole)
        assert (tmp_path / "results.json").read_bytes() == results
        assert sorted((tmp_path / "scores.jsonl").read_bytes().splitlines()) == sorted(content.splitlines())


def test_a_folder_of_results_is_of_one_model_asked_in_one_way(pool, folders, data, tmp_path):
    """More tasks and texts are added; another model, layout or question is refused, and changes nothing."""
    out, texts = tmp_path / "out", tmp_path / "novel.txt"
    texts.write_text("running tokens")
    first = dict(
        load=str(folders["pi"][0]), tasks=["piqa_cloze"], data_dir=str(data), limit=4, output=str(out)
    )

    def run(**changes):
        return pool.run(1, evaluate, EvaluateOptions(**first | changes), True)[0]

    run()
    run(tasks=["c3_letters"])
    run(tasks=None, data_dir=None, limit=None, bits_per_byte=[str(texts)])
    there = results.read(out)
    assert list(there["tasks"]) == ["piqa_cloze", "c3_letters"] and list(there["texts"]) == [str(texts)]
    table = (out / "table.md").read_text()
    assert all(word in table for word in ("piqa_cloze", "c3_letters", "novel.txt"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for changes, said in [
        (
            dict(load=str(folders["plain"][0])),
            r"holds the scores of .*/pi .*weights: \w{12} there, \w{12} here",
        ),
        (dict(tokens_at_once=64), r"\(--tokens-at-once: 4096 there, 64 here\)"),
        (dict(limit=5), r"has piqa_cloze asked otherwise \(--limit: 4 there, 5 here\)"),
        (dict(tasks=["c3_letters"], num_fewshot=1), r"\(--num-fewshot: 0 there, 1 here\)"),
    ]:
        with pytest.raises(WorkerError, match=said):
            run(**changes)
    with pytest.raises(WorkerError, match="--tensor-model-parallel-size: 1 there, 2 here"):
        pool.run(2, evaluate, EvaluateOptions(**first, tensor_model_parallel_size=2), True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_items_of_another_run_are_not_taken_for_those_of_the_results(pool, folders, data, tmp_path):
    """As a kill between the two leaves them, where the questions changed."""
    options = EvaluateOptions(
        load=str(folders["pi"][0]), tasks=["piqa_bpb"], data_dir=str(data), limit=3, output=str(tmp_path)
    )
    pool.run(1, evaluate, options, True)
    whole = results.read(tmp_path)
    items = tmp_path / "items_piqa_bpb.jsonl"
    items.write_bytes(items.read_bytes().replace(b'"index": 0', b'"index": 7'))
    with pytest.raises(EvaluationError, match="items_piqa_bpb.jsonl: damaged .not the items of results.json"):
        results.read(tmp_path)
    pool.run(1, evaluate, options, True)
    assert results.read(tmp_path) == whole


def test_what_is_no_folder_of_results_is_left_alone(folders, data, tmp_path):
    load = folders["pi"][0]
    options = dict(load=str(load), tasks=["piqa_bpb"], data_dir=str(data))
    with pytest.raises(EvaluationError, match=r"--output .*: holds other files \("):
        evaluate(EvaluateOptions(**options, output=str(load)))
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(EvaluationError, match="notes.md: is a file; give a folder"):
        evaluate(EvaluateOptions(**options, output=str(tmp_path / "notes.md")))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"] and not (load / "scores.jsonl").exists()


def test_stopped_by_a_signal_it_goes_on_later(pool, folders, data, tmp_path):
    """SIGTERM while it scores: one line and no temporary folder."""
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    asked = dict(load=str(folders["pi"][1]), tasks=["mmlu_cloze"], data_dir=str(data), tokens_at_once=16)
    words = ["--load", asked["load"], "--tasks", "mmlu_cloze", "--data-dir", data, "--tokens-at-once", "16"]
    process = subprocess.Popen(
        [sys.executable, "tools/evaluate.py", *words, "--output", out], stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    kept = out / "scores.jsonl"
    while process.poll() is None and not (kept.exists() and kept.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said.endswith("evaluate.py: terminated; the same command goes on where it was\n")
    assert not any(temporary.iterdir())
    assert not (out / "results.json").exists()
    resumed = pool.run(1, evaluate, EvaluateOptions(**asked, output=str(out)), True)[0]
    assert answers(resumed) == answers(pool.run(1, evaluate, EvaluateOptions(**asked), True)[0])


REFUSALS = {
    "needs local files": (dict(tasks=["piqa"]), "--tasks piqa_letters: is read from local files; --data-dir"),
    "data missing": (dict(tasks=["c3"], data_dir="NOWHERE"), r"c3-\?-test.json: there is no such file"),
    "no examples": (dict(tasks=["piqa"], num_fewshot=1), "piqa_letters has no questions to take examples"),
    "too few examples": (dict(tasks=["cmmlu_bpb"], num_fewshot=13), "there are 12 examples of a"),
    "no checkpoint": (dict(tasks=["piqa"], load="NOWHERE"), "--load .*: no checkpoint found"),
    "text missing": (dict(bits_per_byte=["NOWHERE.txt"]), "NOWHERE.txt: there is no such file"),
    "no text matches": (dict(bits_per_byte=["NOWHERE.*.txt"]), r"NOWHERE.\*.txt: no file matches"),
    "text of an archive": (dict(bits_per_byte=["TORN.txt.gz"]), "--bits-per-byte .*TORN.txt.gz: "),
    "text of Latin 1": (dict(bits_per_byte=["LATIN.txt"]), "LATIN.txt: not UTF-8 .* at byte 2"),
    "text of nothing": (dict(bits_per_byte=["EMPTY.jsonl"]), "holds no text"),
    "no text": (dict(bits_per_byte=["OTHER.jsonl"]), r"OTHER.jsonl: line 2: no key 'text'"),
    "another tokenizer": (dict(tasks=["piqa"], tokenizer_model="OTHER.model"), "with another tokenizer"),
    "a folder's iteration": (dict(tasks=["piqa"], load="FOLDER", ckpt_step=3), "--ckpt-step: .*FOLDER is a"),
    "too many stages": (dict(tasks=["piqa"], pipeline_model_parallel_size=2), "cannot be divided"),
    "heads that do not divide": (dict(tasks=["piqa"], tensor_model_parallel_size=3), "not divisible"),
}  # fmt: skip


def placed(folder: Path, value):
    """Files of ``REFUSALS`` are in the test's folder."""
    return str(folder / value) if isinstance(value, str) and value.partition(".")[0].isupper() else value


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(pool, folders, data, tmp_path, name):
    changes, said = REFUSALS[name]
    (tmp_path / "OTHER.model").write_bytes(trained(vocab_size=880))
    (tmp_path / "OTHER.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    (tmp_path / "EMPTY.jsonl").write_text("\n")
    (tmp_path / "TORN.txt.gz").write_bytes(gzip.compress(b"running tokens" * 99)[:-9])
    (tmp_path / "LATIN.txt").write_bytes(b"th\xe9")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER/config.json").write_text("{}")
    values = dict(load=str(folders["pi"][0]), tasks=None)
    if name != "needs local files":
        values["data_dir"] = str(data)
    for flag, value in changes.items():
        values[flag] = (
            [placed(tmp_path, one) for one in value] if isinstance(value, list) else placed(tmp_path, value)
        )
    with pytest.raises(WorkerError, match=said):
        pool.run(1, evaluate, EvaluateOptions(**values), True)


def test_ids_without_text_are_refused(pool, tmp_path, data):
    load = toys.checkpoint(tmp_path / "bare", toys.pi_model())
    options = EvaluateOptions(load=str(load), tasks=["piqa"], data_dir=str(data))
    with pytest.raises(WorkerError, match="has no tokenizer, so its ids are numbers"):
        pool.run(1, evaluate, options, True)
    (tmp_path / "large.model").write_bytes(trained())
    options = EvaluateOptions(**vars(options) | {"tokenizer_model": str(tmp_path / "large.model")})
    with pytest.raises(WorkerError, match=r"has \d+ ids, but .* has \d+ rows in its embedding"):
        pool.run(1, evaluate, options, True)


def test_a_model_without_tokenizer_is_scored_with_one_that_is_named(pool, folders, tmp_path, data):
    """A checkpoint, and its Hugging Face folder."""
    (tmp_path / "small.model").write_bytes(trained())
    wanted = dict(tasks=["piqa_bpb"], data_dir=str(data), limit=3)
    found = pool.run(1, evaluate, EvaluateOptions(load=str(folders["pi"][0]), **wanted), True)[0]
    source = open_source(folders["pi"][0])
    bare = export_folder(tmp_path / "hf", source.model, source.dtype, source.get, tokenizer=None)
    load = toys.checkpoint(tmp_path / "bare", source.model)  # with the same weights
    with pytest.raises(WorkerError, match="has no tokenizer, so no text can be scored; --tokenizer-model"):
        pool.run(1, evaluate, EvaluateOptions(load=str(bare), **wanted), True)
    for one in (bare, load):
        options = EvaluateOptions(load=str(one), tokenizer_model=str(tmp_path / "small.model"), **wanted)
        assert_same(answers(pool.run(1, evaluate, options, True)[0]), answers(found))


def test_unknown_tasks_are_refused_before_the_harness_reads_all_of_its_own(monkeypatch):
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", None)
    options = EvaluateOptions(load="x", tasks=["piqa", "c3_clos", "xyzzy-plugh", "bolq"])
    said = r"--tasks c3_clos xyzzy-plugh bolq: unknown \(did you mean c3_cloze boolq\?\); there are cmmlu"
    with pytest.raises(EvaluationError, match=said):
        loaded_tasks(options)


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    import datasets
    from huggingface_hub import constants

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        thread = threading.Thread(target=hub.handle_request)
        thread.start()
        assert silent_hub() is None and not constants.HF_HUB_OFFLINE  # it knows no GET, but answers
        thread.join()
    assert silent_hub() == constants.ENDPOINT
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE and silent_hub() is None


def test_files_of_examples_are_read_for_examples_alone(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "cmmlu/dev")
    (tmp_path / "c3/c3-d-dev.json").write_text("damaged")
    asked = dict(load="x", tasks=["cmmlu_cloze", "c3_bpb"], data_dir=str(tmp_path))
    assert list(loaded_tasks(EvaluateOptions(**asked))) == asked["tasks"]
    with pytest.raises(EvaluationError, match="cmmlu/dev/.*: there is no such file"):
        loaded_tasks(EvaluateOptions(**asked, num_fewshot=1))
    with pytest.raises(EvaluationError, match="c3-d-dev.json: not JSON"):
        loaded_tasks(EvaluateOptions(**asked | {"tasks": ["c3_bpb"]}, num_fewshot=1))


def test_what_cannot_be_meant():
    assert EvaluateOptions(load="a").problems() == ["give --tasks, --bits-per-byte, or --compare"]
    assert EvaluateOptions(tasks=["piqa"]).problems() == ["--tasks and --bits-per-byte need --load"]
    found = EvaluateOptions(compare=["a", "b"], tasks=["piqa"], load="c", limit=0).problems()
    assert found == [
        "--limit 0: must be at least 1",
        "--compare reads results that are there: leave --tasks and --bits-per-byte out",
    ]
    idle = EvaluateOptions(
        compare=["a", "b"],
        output="c",
        data_dir="d",
        num_fewshot=2,
        tensor_model_parallel_size=2,
        dtype="fp32",
    )
    assert idle.problems() == [
        "--data-dir cannot take effect: needs one of our benchmarks in --tasks",
        "--num-fewshot cannot take effect: needs --tasks",
        "--output, --tensor-model-parallel-size cannot take effect: needs --tasks or --bits-per-byte",
    ]
    idle = EvaluateOptions(load="a", bits_per_byte=["b"], data_dir="c")
    assert idle.problems() == ["--data-dir cannot take effect: needs one of our benchmarks in --tasks"]
    assert EvaluateOptions(load="a", tasks=["boolq", "c3_bpb"], data_dir="c", limit=2).problems() == []


def test_bits_per_byte_of_checkpoint_and_folder(pool, folders, tmp_path):
    load, folder = folders["pi"]
    records = [{"text": f"running tokens {i} " * 30, "source": f"{'ab'[i % 2]}/x"} for i in range(5)]
    del records[4]["source"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    novel, packed, marked = (tmp_path / f"novel{name}" for name in (".txt", "2.txt.gz", "3.txt"))
    novel.write_text("的一是在不了有和人" * 20)
    packed.write_bytes(gzip.compress(novel.read_bytes()))
    marked.write_bytes(b"\xef\xbb\xbf" + novel.read_bytes())
    options = dict(bits_per_byte=[str(texts), f"{tmp_path}/novel*"])
    ours, theirs = (
        pool.run(2, evaluate, EvaluateOptions(load=str(one), **options), True)[0]["texts"]
        for one in (load, folder)
    )
    assert ours[str(novel)]["bits_per_byte"] == pytest.approx(theirs[str(novel)]["bits_per_byte"], abs=1e-6)
    assert ours[str(novel)]["sources"] == {} and ours[str(novel)]["bytes"] == novel.stat().st_size
    assert ours[str(packed)] == ours[str(marked)] == ours[str(novel)]
    of_texts = ours[str(texts)]
    assert of_texts["documents"] == 5
    assert of_texts["bytes"] == sum(len(record["text"]) for record in records)
    assert list(of_texts["sources"]) == ["(no source)", "a", "b"]
    weighted = sum(one["bits_per_byte"] * one["bytes"] for one in of_texts["sources"].values())
    assert weighted / of_texts["bytes"] == pytest.approx(of_texts["bits_per_byte"])


def test_generates_as_transformers_does(pool, folders, data):
    """generate_until of the harness's own class on the same requests."""
    pytest.importorskip("accelerate", reason="lm_eval's own model needs accelerate")
    load, folder = folders["plain"]
    for found in pool.run(2, generated, str(load)):
        assert found == generated_by_stock(str(folder))


def requests():
    from lm_eval.api.instance import Instance

    settings = {"until": ["token", "\n"], "max_gen_toks": 12}
    texts = ("running models", "tokens merged", "the of and " * 60)
    return [Instance("generate_until", {}, (text, settings), i, ("t", i, 1)) for i, text in enumerate(texts)]


def generated(load: str) -> list[str]:
    from megatron_ext.evaluation.scoring import Scorer
    from megatron_ext.harness.language_model import PanguLM
    from megatron_ext.harness.load import opened

    with opened(EvaluateOptions(load=load, tasks=["t"])) as model:
        return PanguLM(model, Scorer([model.model], POSITIONS)).generate_until(requests())


def generated_by_stock(folder: str) -> list[str]:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, trust_remote_code=True, dtype="float32", device="cpu").generate_until(
        requests()
    )
