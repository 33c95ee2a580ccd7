"""The network interface that leads to the other hosts of a job."""

import os
import socket
import sys

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def gloo_interface(master: str) -> str | None:
    """The interface to bind gloo to: the one towards ``master``, the address of the first host.

    On one host this is the loopback interface. None leaves the choice to gloo, which resolves the
    host's own name, and fails if that name is unknown or resolves to the loopback address
    (pytorch/pytorch#26049).
    """
    if on_one_host(master):
        return LOOPBACK
    own = _address_towards(master)
    if own is None or own.startswith("127."):
        return None
    return _interface_of(own)


def on_one_host(master: str) -> bool:
    """Whether all processes of the job are on this host; ``master`` is the address of the first."""
    environment = os.environ
    everyone = int(environment.get("LOCAL_WORLD_SIZE", 0)) == int(environment.get("WORLD_SIZE", 1))
    return everyone or master in ("127.0.0.1", "localhost")


def _address_towards(host: str) -> str | None:
    """This host's address on the route to ``host``; connecting a datagram socket sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return None


def _interface_of(address: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            return name
    return None
