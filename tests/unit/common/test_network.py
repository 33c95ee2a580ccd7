"""The interface that leads to the other hosts."""

import psutil
import pytest

from megatron_ext.common import network


@pytest.fixture
def hosts(monkeypatch):
    """A job on two hosts."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def test_one_host_needs_no_network(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert network.gloo_interface("some.host") == network.LOOPBACK


def test_loopback_by_name(hosts):
    assert network.gloo_interface("127.0.0.1") == network.LOOPBACK


def test_the_interface_of_an_address(hosts):
    """Each of this host's own IPv4 addresses leads to the interface that has it."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                assert network.gloo_interface(address.address) == name


def test_what_does_not_help_is_left_to_gloo(hosts):
    assert network.gloo_interface("127.0.1.1") is None
    assert network.gloo_interface("no.such.host.invalid") is None
