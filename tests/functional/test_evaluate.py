"""tools/evaluate.py: what the harness says of the exported model, at every layout, after any kill."""

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval (extra eval)")
toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")

from megatron_ext.evaluation.documents import EvaluationError, documents  # noqa: E402
from megatron_ext.evaluation.forms import item_of  # noqa: E402
from megatron_ext.harness.options import EvaluateOptions  # noqa: E402
from megatron_ext.harness.run import evaluate, loaded_tasks  # noqa: E402
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
                assert task["truncated"] > 0
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


REFUSALS = {
    "needs local files": (dict(tasks=["piqa"]), "--tasks piqa_letters: is read from local files; --data-dir"),
    "data missing": (dict(tasks=["c3"], data_dir="NOWHERE"), r"c3-\?-test.json: there is no such file"),
    "no examples": (dict(tasks=["piqa"], num_fewshot=1), "piqa_letters has no questions to take examples"),
    "too few examples": (dict(tasks=["cmmlu_bpb"], num_fewshot=13), "there are 12 examples of a"),
    "no checkpoint": (dict(tasks=["piqa"], load="NOWHERE"), "--load .*: no checkpoint found"),
    "text missing": (dict(bits_per_byte=["NOWHERE.txt"]), "No such file"),
    "text of nothing": (dict(bits_per_byte=["EMPTY.jsonl"]), "holds no text"),
    "no text": (dict(bits_per_byte=["OTHER.jsonl"]), r"OTHER.jsonl: line 2: no key 'text'"),
    "another tokenizer": (dict(tasks=["piqa"], tokenizer_model="OTHER.model"), "with another tokenizer"),
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


@pytest.mark.skipif(not LONG, reason="the harness reads all its tasks: LONG_TESTS=1")
def test_unknown_tasks_are_refused():
    with pytest.raises(EvaluationError, match="--tasks squirrel: unknown; there are cmmlu"):
        loaded_tasks(EvaluateOptions(load="x", tasks=["piqa", "squirrel"]))


def test_what_cannot_be_meant():
    assert EvaluateOptions(load="a").problems() == ["give --tasks, --bits-per-byte, or --compare"]
    assert EvaluateOptions(tasks=["piqa"]).problems() == ["--tasks need --load"]
    found = EvaluateOptions(compare=["a", "b"], load="c", limit=0).problems()
    assert len(found) == 3 and "--limit 0: must be at least 1" in found


def test_bits_per_byte_of_checkpoint_and_folder(pool, folders, tmp_path):
    load, folder = folders["pi"]
    records = [{"text": f"running tokens {i} " * 30, "source": f"{'ab'[i % 2]}/x"} for i in range(5)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    novel = tmp_path / "novel.txt"
    novel.write_text("的一是在不了有和人" * 20)
    options = dict(bits_per_byte=[str(texts), str(novel)])
    ours, theirs = (
        pool.run(2, evaluate, EvaluateOptions(load=str(one), **options), True)[0]["texts"]
        for one in (load, folder)
    )
    assert ours[str(novel)]["bits_per_byte"] == pytest.approx(theirs[str(novel)]["bits_per_byte"], abs=1e-6)
    of_texts = ours[str(texts)]
    assert of_texts["documents"] == 5
    assert of_texts["bytes"] == sum(len(record["text"]) for record in records)
    assert list(of_texts["sources"]) == ["a", "b"]
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
