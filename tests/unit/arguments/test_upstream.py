"""Spellings and defaults equal Megatron-LM's, according to the list of its flags."""

import ast
import json
from pathlib import Path

import pytest

from megatron_ext.arguments import parse_args
from megatron_ext.arguments.unsupported import known_to_upstream, spellings
from megatron_ext.common.flags import argparse_form, default_of
from megatron_ext.config import options

#: Where the list shows the field's own default, not the flag's, or where we choose another.
OTHER_DEFAULTS = {
    "--num-layers": None,  # required: the flag's default is None, the field's 0
    "--hidden-size": None,
    "--num-attention-heads": None,
    "--num-query-groups": 1,  # the flag's default is 1, the field's None
    "--use-cpu-initialization": None,
    "--local-rank": None,  # taken from the environment
    "--distributed-backend": None,  # found
    "--transformer-impl": None,  # found
    "--muon-tp-mode": "duplicated",  # so that the update does not depend on the layout
}


def upstream_flags(shared: Path) -> dict[str, tuple[str, str]]:
    """Flag -> (action or annotation, default as it is written)."""
    found = {}
    for line in (shared / "reference/megatron_flags_0.16.1.tsv").read_text().splitlines():
        if not line.startswith("#"):
            _, names, kind, action, default, *_ = line.split("\t") + [""]
            found |= dict.fromkeys(names.split(), (kind if action == "(auto)" else action, default))
    return found


def written_default(kind: str, text: str):
    if not text:
        return {"'store_true'": False, "'store_false'": True}.get(kind)
    if text.startswith("field(default_factory="):
        return [0] if "[0]" in text else []
    if "." in text and text.split(".")[0] in ("signal", "AttnBackend"):
        return text.split(".")[1]
    if "**" in text:
        base, power = text.split("**")
        return int(base) ** int(power)
    return ast.literal_eval(text)


def test_shared_flags_have_upstreams_defaults(shared):
    upstream, compared, wrong = upstream_flags(shared), 0, []
    for option in options().values():
        for name in argparse_form(option)[0]:
            if name not in upstream:
                continue
            ours = default_of(option)
            expected = OTHER_DEFAULTS[name] if name in OTHER_DEFAULTS else written_default(*upstream[name])
            compared += 1
            if getattr(ours, "name", ours) != expected:
                wrong.append((name, ours, expected))
    assert not wrong
    assert compared > 200


def test_every_upstream_flag_is_taken_or_refused_with_a_reason(shared):
    upstream, taken, refused = set(upstream_flags(shared)), set(spellings()), set(known_to_upstream())
    assert upstream - taken - refused == set()
    assert taken & refused == set()
    assert refused - upstream == set()
    assert all(known_to_upstream().values())


def test_megatrons_own_run_is_understood(shared):
    trace = json.loads((shared / "reference/golden/gqa_1p/trace.json").read_text())
    run = parse_args(trace["flags"], world_size=1, device="cpu", check_files=False)
    assert (run.schedule.lr_decay_steps, run.schedule.lr_warmup_steps, run.schedule.wd_incr_steps) == (
        80,
        8,
        80,
    )
    assert (run.model.num_query_groups, run.model.kv_channels, run.parallel.data_parallel_size) == (2, 16, 1)
    assert run.optimizer.start_weight_decay == run.optimizer.end_weight_decay == 0.1
    assert (run.model.add_bias_linear, run.model.add_qkv_bias, run.model.layernorm_epsilon) == (
        False,
        False,
        1e-5,
    )


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"])
def test_megatrons_own_run_on_another_layout(shared, layout):
    trace = json.loads((shared / "reference/golden/gqa_1p/trace.json").read_text())
    run = parse_args([*trace["flags"], layout], world_size=4, device="cpu", check_files=False)
    assert run.parallel.data_parallel_size == 2
