"""tools/doctor.py: its findings here, and on machines that lack something."""

import importlib.metadata
import importlib.util
import json
import sys

import pytest
import torch

from megatron_ext.planning import machine, speed
from megatron_ext.training import metrics
from tests.conftest import REPOSITORY

SPEC = importlib.util.spec_from_file_location("doctor", REPOSITORY / "tools" / "doctor.py")
doctor = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(doctor)


def test_this_machine_can_run(capsys):
    assert doctor.main(["--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert {"Python", "torch", "Megatron-Core", "GPU", "Transformer Engine", "SLURM"} < set(found)
    assert found["Megatron-Core"]["found"] == importlib.metadata.version("megatron-core")


def test_one_screen(capsys):
    doctor.main([])
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 40 and max(map(len, screen)) <= 140


def test_missing_things_come_with_commands(monkeypatch):
    monkeypatch.setattr(machine, "version_of", lambda package: None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    found = {finding.name: finding for finding in machine.findings()}
    assert found["torch"].state == found["Megatron-Core"].state == "problem"
    assert found["extensions"].command == "apt install g++"
    screen = "\n".join(doctor.lines(list(found.values())))
    assert "to get what is missing:" in screen and "pip install megatron-core==" in screen


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [
        ("0.16.1", "ok", "the engine"),
        ("0.19.2", "warning", "docs/engine.md says; the program is tested with 0.16.1"),
        ("0.18.2", "problem", "refused: the program is tested with 0.16.1"),
        (None, "problem", "nothing runs without it"),
    ],
)
def test_engines_of_other_versions(monkeypatch, version, state, said):
    monkeypatch.setattr(machine, "version_of", lambda package: version)
    found = machine.megatron_core()
    assert found.state == state and said in found.use
    assert bool(found.command) == (state != "ok")


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine that has a GPU, as far as the checks can tell, and no network of packages."""
    monkeypatch.setattr(machine, "_gpu_count", lambda: 1)
    monkeypatch.setattr(machine.engine, "gpu", lambda: ((9, 0), (12, 9)))


@pytest.mark.parametrize(
    ("version", "module", "state", "said"),
    [
        (None, None, "absent", "not installed"),
        ("2.8.0", None, "problem", "2.8.0 is too old"),
        ("2.13.0", "", "warning", "2.13.0 is untested"),
        ("2.11.0+abc", "raise OSError('no libcudnn')", "problem", "does not import: OSError: no libcudnn"),
        ("2.11.0", "", "ok", "2.11.0"),
    ],
)
def test_transformer_engine_on_a_gpu(with_gpu, monkeypatch, tmp_path, version, module, state, said):
    """The package is imported for real, in a process of its own, from a folder made here."""
    if module is not None:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine" / "__init__.py").touch()
        (tmp_path / "transformer_engine" / "pytorch.py").write_text(module)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "version_of", lambda package: version)
    found = machine.transformer_engine()
    assert found.state == state and said in found.found
    assert bool(found.command) == (state != "ok")
    assert sys.modules.get("transformer_engine") is None


@pytest.mark.parametrize(("check", "module"), [(machine.apex, "apex"), (machine.triton, "triton")])
@pytest.mark.parametrize("content", [None, "", "raise RuntimeError('built for another torch')"])
def test_optional_packages_that_do_not_import(with_gpu, monkeypatch, tmp_path, check, module, content):
    if content is not None:
        (tmp_path / f"{module}.py").write_text(content)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machine, "version_of", lambda package: None)  # torch may have brought Triton along
    if content is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.delitem(sys.modules, module, raising=False)
    found = check()
    said = {None: "not installed", "": "installed"}.get(content, "RuntimeError: built for another torch")
    assert (found.state == "ok") == (content == "") and said in found.found


def test_link_and_disk_are_measured():
    assert speed.link_bytes_per_second(size=1 << 20, times=2) > 1e6
    assert speed.disk_bytes_per_second(1 << 20) > 1e5


def test_what_is_called_measured_was_measured(monkeypatch):
    """A data sheet's peak, handed to tools/plan_run.py as measured, would make every plan too fast."""
    monkeypatch.setattr(metrics, "data_sheet_flops", lambda name, half: pytest.fail("not measured"))
    monkeypatch.setattr(metrics, "measured_flops", lambda dtype: 5e12)
    monkeypatch.setattr(speed, "link_bytes_per_second", lambda: 1e9)
    monkeypatch.setattr(speed, "disk_bytes_per_second", lambda: 1e8)
    assert doctor.measured()["matmul_tflops"] == 5.0


def test_a_run_takes_the_data_sheet_where_there_is_one(monkeypatch):
    monkeypatch.setattr(metrics.platform, "on_gpu", lambda: True)
    monkeypatch.setattr(metrics.platform, "device_name", lambda: "NVIDIA H100 NVL")
    metrics.peak_flops.cache_clear()
    assert metrics.peak_flops(torch.bfloat16) == 835e12
    assert metrics.peak_flops(torch.float32) == 60e12
    metrics.peak_flops.cache_clear()


@pytest.mark.parametrize(
    "torch_version, cudnn, capability, kernel",
    [
        ("2.13.0+cu130", 92000, (9, 0), "cuDNN"),
        ("2.11.0", 91501, (10, 3), "cuDNN"),
        ("2.11.0", 91500, (9, 0), "FlashAttention 2; torch 2.11 or newer takes cuDNN's, which is faster"),
        ("2.9.1", 92000, (9, 0), "FlashAttention 2; torch 2.11 or newer takes cuDNN's, which is faster"),
        ("2.13.0", 92000, (8, 0), "FlashAttention 2"),
        ("2.13.0", None, (12, 0), "FlashAttention 2"),
    ],
)
def test_which_attention_torch_takes_first(torch_version, cudnn, capability, kernel):
    assert machine.attention_kernel(torch_version, cudnn, capability) == kernel
