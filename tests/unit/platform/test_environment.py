"""Environment variables of CUDA's libraries: set if missing, reported if wrong."""

from datetime import timedelta

import pytest

from megatron_ext import platform
from megatron_ext.common import network
from megatron_ext.platform import environment
from tests.unit.arguments.test_validate import BASE, problems_of

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", *environment.DETERMINISTIC)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A process that has chosen a GPU; nothing is computed on it."""
    monkeypatch.setattr(platform.device, "_device_type", "cuda")


def test_layers_that_are_split_get_one_queue():
    assert environment.settings(True, False) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert environment.settings(False, False) == {}


def test_what_is_wanted_is_set_on_a_gpu_unless_it_is_there(gpu, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    platform.activate("auto", environment.settings(True, True))
    found = {name: environment.os.environ[name] for name in NAMES}
    assert found == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    assert environment.not_deterministic() == []


def test_a_cpu_needs_none(monkeypatch):
    platform.activate("cpu", environment.settings(True, True))
    assert not set(NAMES) & set(environment.os.environ)


@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--context-parallel-size"])
def test_the_command_line_asks_for_it(gpu, flag):
    from megatron_ext.arguments import defaults
    from megatron_ext.arguments.parser import make_parser, with_defaults
    from megatron_ext.config import RunConfig

    typed = vars(make_parser().parse_args([flag, "2", "--deterministic-mode"]))
    defaults.device(RunConfig.of(with_defaults(typed, [])), None)
    assert set(NAMES) <= set(environment.os.environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_ALGO", "NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")],
)
def test_what_is_not_deterministic_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    line = f"{BASE} --bf16 --transformer-impl local"
    [problem] = problems_of(f"{line} --deterministic-mode", device="cuda")
    assert problem.startswith(f"--deterministic-mode: {name}={value} is in the environment")
    assert problems_of(line, device="cuda") == []
    assert problems_of(f"{BASE} --deterministic-mode") == []  # of no interest to a CPU


def test_gloo_is_bound_beside_nccl_too(monkeypatch):
    """This torch may have no nccl, but the interface is chosen before that matters."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store, minute = (
        platform.rendezvous.open_store(0, 1, timedelta(minutes=1)),
        timedelta(minutes=1),
    )
    with pytest.raises((RuntimeError, ValueError)):
        platform.init_process_group("nccl", 0, 1, 0, minute, store)
    assert environment.os.environ["GLOO_SOCKET_IFNAME"] == network.LOOPBACK
