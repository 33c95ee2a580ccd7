"""Detects within moments that a process of the job has died, whatever the other ranks are doing.

Every rank holds a connection to rank 0. The operating system closes the connections of a process that
dies at once, even if the process was killed; rank 0 then informs the other ranks. Collectives detect a
dead peer too, but only between processes that are already connected: while the ranks create their process
groups, the peers of a dead process would wait for it until their timeout.
"""

import contextlib
import hmac
import os
import secrets
import socket
import time
import weakref
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from torch.distributed import Store

from megatron_ext.common import network
from megatron_ext.common.errors import LostProcess

_KEY, _WELCOME, _SHUTDOWN, _GONE = "peer_monitor", "welcome", "bye", "gone"
#: Connecting takes milliseconds; a host that does not answer is behind a firewall.
_CONNECT_SECONDS = 20.0
#: Number of attempts to reconnect, the pause before each, and the timeout of each.
_ATTEMPTS, _PAUSE_SECONDS, _RECONNECT_SECONDS = 5, 0.2, 2.0
#: A rank identifies itself as soon as it is connected. Until then a connection is an unknown peer, such as
#: a port scanner or a health check. At most this many are kept, each for this long; the oldest is dropped
#: first.
MAX_UNKNOWN_PEERS, UNKNOWN_PEER_SECONDS = 64, 5.0
#: Rate limit, so that a flood of connections does not occupy a core: this many are accepted per window; after
#: an error the pause is longer. There is no pause below the limit: the listen queue is short, and a peer that
#: finds it full retries only after a second.
_MAX_ACCEPTS, _WINDOW_SECONDS, _ERROR_SECONDS = 64, 0.1, 1.0
_MAX_GREETING, _MAX_MESSAGE = 100, 1000


@dataclass
class _Connection:
    """A connection to ``rank``, which is None until the peer has identified itself.

    ``unread`` is an incomplete message; ``welcome`` is set once rank 0 has accepted this rank.
    """

    socket: socket.socket
    rank: int | None
    unread: bytes = b""
    since: float = field(default_factory=time.monotonic)
    welcome: bool = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, *words: object) -> None:
        """Send a message; a broken connection is detected when it is read."""
        with contextlib.suppress(OSError):
            self.socket.send(" ".join(map(str, words)).encode() + b"\n")

    def messages(self) -> list[list[str]] | None:
        """The messages received, each split into words; None if the peer's process closed the connection.

        Raises OSError for a network error, which does not mean that the process has died.
        """
        try:
            data = self.socket.recv(4096)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None
        if not data:
            return None
        *whole, self.unread = (self.unread + data).split(b"\n")
        if len(self.unread) > (_MAX_GREETING if self.rank is None else _MAX_MESSAGE):
            raise OSError("the message is too long")
        return [message.decode(errors="replace").split() for message in whole]


class PeerMonitor:
    """The connections of this rank: rank 0 has one to every other rank, the others have one to rank 0.

    ``store`` is the job's key-value store; this process is ``rank`` of ``world_size``. If no connection can
    be made (a firewall), ``problem`` says why, and this rank runs without one.

    Raises LostProcess if rank 0 is on this host and has already exited.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self.rank, self.world_size, self.problem = rank, world_size, ""
        self._listener: socket.socket | None = None
        self._listens_from, self._attempts = 0.0, 0
        self._window_ends, self._accepted = 0.0, 0
        self._connections: list[_Connection] = []
        self._unknown: list[_Connection] = []
        self._wake, self._woken = socket.socketpair()
        if world_size > 1:
            self._listen(store) if rank == 0 else self._connect_first(store)
        _open_monitors.add(self)

    def _listen(self, store: Store) -> None:
        host = "127.0.0.1" if network.on_one_host(os.environ.get("MASTER_ADDR", "")) else ""
        dual = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(
            (host, 0), family=family, backlog=self.world_size, dualstack_ipv6=dual
        )
        self._listener.setblocking(False)
        # Only ranks can read the token from the store: a peer without it is not one of them.
        self._token = secrets.token_hex(16)
        store.set(_KEY, f"{self._listener.getsockname()[1]} {self._token}")

    def _connect_first(self, store: Store) -> None:
        port, self._token = store.get(_KEY).decode().split()
        master = os.environ.get("MASTER_ADDR", "")
        here = network.on_one_host(master)
        self._address = ("127.0.0.1" if here else master, int(port))
        try:
            self._connect()
        except OSError as error:
            if here and isinstance(error, ConnectionRefusedError):
                raise LostProcess("rank 0 was killed or does not answer") from error
            self.problem = f"{self._address[0]}:{port}: {error}"

    def _connect(self, seconds: float = _CONNECT_SECONDS) -> None:
        peer = _Connection(socket.create_connection(self._address, seconds), 0)
        peer.socket.setblocking(False)
        peer.send(self._token, self.rank)
        self._connections.append(peer)

    def _reconnect(self) -> list[int]:
        """Reconnect after a network error, or when dropped as unknown; returns [0] if rank 0 is gone."""
        while self._attempts < _ATTEMPTS:
            self._attempts += 1
            time.sleep(_PAUSE_SECONDS)
            try:
                self._connect(_RECONNECT_SECONDS)
                break
            except ConnectionRefusedError:
                return [0]
            except OSError:
                continue
        return []

    def wait(self, seconds: float) -> list[int]:
        """Wait for ``seconds`` or until something happens; returns the ranks found to be gone."""
        gone: list[int] = []
        ends: list[Any] = [self._woken, *self._connections]
        if self._listener is not None:
            pause = self._listens_from - time.monotonic()
            ends += [self._listener, *self._unknown] if pause <= 0 else []
            seconds = min(seconds, pause if pause > 0 else 1.0 if self._unknown else seconds)
        for ready in connection.wait(ends, seconds):
            if self._listener is not None and ready is self._listener:
                self._accept(self._listener)
            elif isinstance(ready, _Connection):
                gone += self._receive(ready)
        for peer in [peer for peer in self._unknown if time.monotonic() - peer.since > UNKNOWN_PEER_SECONDS]:
            self._drop(peer)
        for peer in self._connections if self.rank == 0 else ():
            for rank in gone:
                peer.send(_GONE, rank)
        return gone

    def _accept(self, listener: socket.socket) -> None:
        now = time.monotonic()
        if now >= self._window_ends:
            self._window_ends, self._accepted = now + _WINDOW_SECONDS, 0
        while self._accepted < _MAX_ACCEPTS:
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # such as no free descriptor: select would report the pending peers again at once
                self._listens_from = time.monotonic() + _ERROR_SECONDS
                return
            self._accepted += 1
            accepted.setblocking(False)
            if len(self._unknown) >= MAX_UNKNOWN_PEERS:
                self._drop(self._unknown[0])
            self._unknown.append(_Connection(accepted, None))
            self._receive(self._unknown[-1])  # a rank has identified itself by now
        self._listens_from = self._window_ends

    def _receive(self, peer: _Connection) -> list[int]:
        try:
            messages = peer.messages()
        except OSError:
            self._drop(peer)
            return self._reconnect() if peer.rank == 0 else []
        if messages is None:
            self._drop(peer)
            if peer.rank == 0 and not peer.welcome:
                return self._reconnect()
            return [] if peer.rank is None else [peer.rank]
        gone = []
        for words in messages:
            if peer.rank is None:
                if not self._identify(peer, words):
                    break
            elif words == [_WELCOME]:
                peer.welcome, self._attempts = True, 0
            elif words == [_SHUTDOWN]:
                self._drop(peer)
            elif len(words) == 2 and words[0] == _GONE and words[1].isdecimal():
                gone.append(int(words[1]))
        return gone

    def _identify(self, peer: _Connection, words: list[str]) -> bool:
        """Whether the first message identifies the peer as a rank; any other peer is dropped."""
        known = len(words) == 2 and hmac.compare_digest(words[0].encode(), self._token.encode())
        if not (known and words[1].isdecimal() and 0 < int(words[1]) < self.world_size):
            self._drop(peer)
            return False
        peer.rank = int(words[1])
        for old in [old for old in self._connections if old.rank == peer.rank]:
            self._drop(old)  # the rank has reconnected
        self._unknown.remove(peer)
        self._connections.append(peer)
        peer.send(_WELCOME)
        return True

    def _drop(self, peer: _Connection) -> None:
        peer.socket.close()
        for peers in (self._connections, self._unknown):
            if peer in peers:
                peers.remove(peer)

    def wake(self) -> None:
        """Make ``wait`` return at once from now on; called from another thread."""
        self._wake.send(b"\0")

    def close(self) -> None:
        """Send the shutdown message, so that this rank is not reported as lost, and disconnect."""
        for peer in self._connections:
            peer.send(_SHUTDOWN)
        self.disconnect()

    def disconnect(self) -> None:
        """Close all sockets without a message; in a forked process they are copies."""
        sockets = (peer.socket for peer in (*self._connections, *self._unknown))
        for end in (*sockets, self._listener, self._wake, self._woken):
            if end is not None:
                end.close()
        self._connections, self._unknown, self._listener = [], [], None


_open_monitors: weakref.WeakSet[PeerMonitor] = weakref.WeakSet()


def _close_in_child() -> None:
    # Otherwise a data worker would keep the connection of a killed rank open.
    for monitor in list(_open_monitors):
        monitor.disconnect()


os.register_at_fork(after_in_child=_close_in_child)
