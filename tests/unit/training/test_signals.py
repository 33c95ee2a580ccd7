"""The first signal requests a stop, the second ends the run; during set-up the first one ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_ext.common.errors import Interrupted
from megatron_ext.training.signals import StopSignals

#: Waits where only the signals can end it; says what it was asked.
WAITS = """
import sys, time
from megatron_ext.training.signals import StopSignals
with StopSignals() as signals:
    signals.begin()
    print("ready", flush=True)
    while signals.received is None or sys.argv[1] == "busy":
        time.sleep(0.01)
print("ended in order:", signals.received)
"""


def waiting(kind: str, **environment: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", WAITS, kind]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | environment
    )
    assert run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_is_a_request(number):
    run = waiting("idle")
    run.send_signal(number)
    output, errors = run.communicate(timeout=20)
    assert (run.returncode, output) == (0, f"ended in order: {number.name}\n")
    assert errors == f"received {number.name}: stopping in order; a second one ends the run at once\n"


@pytest.mark.parametrize(("launcher", "apart"), [({}, 1.0), ({"LOCAL_RANK": "0"}, 2.5)])
def test_the_second_ends_at_once(launcher, apart):
    run = waiting("busy", **launcher)
    for number in (signal.SIGTERM, signal.SIGINT):
        run.send_signal(number)
        time.sleep(apart)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 130
    assert errors.splitlines()[1:] == ["second signal (SIGINT): ending without a save"]


@pytest.mark.parametrize(("launcher", "apart"), [({}, 0.05), ({"LOCAL_RANK": "0"}, 0.8)])
def test_what_a_launcher_passes_on_is_the_same_request(launcher, apart):
    run = waiting("busy", **launcher)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(apart)
    assert run.poll() is None
    run.kill()
    run.communicate()


def test_in_set_up_it_interrupts_once():
    seen = []
    with pytest.raises(Interrupted) as ended, StopSignals() as signals:
        signals.answer(signal.SIGUSR2)
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGUSR2)  # the cleaning up is not interrupted, too
            seen.append(time.sleep(0.01))
    assert ended.value.code == 128 + signal.SIGUSR2 and seen
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_what_a_library_made_of_it_is_still_an_interrupt():
    with pytest.raises(Interrupted), StopSignals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException as error:
            raise ImportError("numpy cannot be imported") from error


def test_nohup_is_heeded():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_to_a_forked_process_is_its_own():
    with StopSignals() as signals:
        signals.begin()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.05)
        assert signals.received is None
