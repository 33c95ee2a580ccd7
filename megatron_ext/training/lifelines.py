"""Notices within moments that a process of the job has gone, whatever the others do meanwhile.

Every rank holds a connection to rank 0. The system closes the connections of a process that dies,
at once and also of one that had no time to say anything; rank 0 passes it on over the others.
Collectives notice it too, but only between processes that are connected already: while the ranks
make their process groups, the peers of one that died would wait for it until their timeout.
"""

import contextlib
import os
import secrets
import socket
import weakref
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from torch.distributed import Store

from megatron_ext.platform import network
from megatron_ext.training.errors import LostProcess

_KEY, _FAREWELL, _GONE = "lifelines", "bye", "gone"
#: To connect to a host takes milliseconds; one that answers nothing is behind a firewall.
_CONNECT_SECONDS = 20.0


@dataclass
class _Line:
    """A connection to ``rank``, which is None until it has said who it is; ``unread`` is half a message."""

    socket: socket.socket
    rank: int | None
    unread: bytes = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def say(self, *words: object) -> None:
        """Send a message; a line that is broken is noticed when it is read."""
        with contextlib.suppress(OSError):
            self.socket.send(" ".join(map(str, words)).encode() + b"\n")

    def messages(self) -> list[list[str]] | None:
        """What came, in words; None if the other end was closed by its process or its system.

        Raises OSError if the network between is at fault, which says nothing of the process.
        """
        try:
            data = self.socket.recv(4096)
        except ConnectionResetError:
            return None
        if not data:
            return None
        *whole, self.unread = (self.unread + data).split(b"\n")
        if len(self.unread) > 1000:
            raise OSError("no message of ours is that long")
        return [message.decode(errors="replace").split() for message in whole]


class Lifelines:
    """The lines of this rank: of rank 0 to every other, of the others to rank 0.

    ``store`` is where the ranks meet; ``rank`` of ``world_size`` is this process. A line that cannot
    be made (a firewall) is told in ``problem``, and does without.

    Raises LostProcess if rank 0, on this same host, has gone before.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self.rank, self.problem = rank, ""
        self._listener: socket.socket | None = None
        self._lines: list[_Line] = []
        self._wake, self._woken = socket.socketpair()
        if world_size > 1:
            self._listen(store, world_size) if rank == 0 else self._connect(store)
        _open_lines.add(self)

    def _listen(self, store: Store, world_size: int) -> None:
        host = "127.0.0.1" if network.on_one_host(os.environ.get("MASTER_ADDR", "")) else ""
        dual = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(
            (host, 0), family=family, backlog=world_size, dualstack_ipv6=dual
        )
        # Whoever knows the token has it from the store: a line of a stranger means nothing.
        self._token = secrets.token_hex(8)
        store.set(_KEY, f"{self._listener.getsockname()[1]} {self._token}")

    def _connect(self, store: Store) -> None:
        port, token = store.get(_KEY).decode().split()
        master = os.environ.get("MASTER_ADDR", "")
        here = network.on_one_host(master)
        host = "127.0.0.1" if here else master
        try:
            line = _Line(socket.create_connection((host, int(port)), _CONNECT_SECONDS), 0)
        except OSError as error:
            if here and isinstance(error, ConnectionRefusedError):
                raise LostProcess("rank 0 was killed or does not answer") from error
            self.problem = f"{host}:{port}: {error}"
            return
        line.socket.setblocking(False)
        line.say(token, self.rank)
        self._lines.append(line)

    def wait(self, seconds: float) -> list[int]:
        """Wait so long, or until something happens; the ranks that turn out to have gone."""
        gone: list[int] = []
        ends: list[Any] = [end for end in (self._woken, self._listener) if end is not None]
        for ready in connection.wait([*ends, *self._lines], seconds):
            if ready is self._listener:
                with contextlib.suppress(OSError):
                    accepted, _ = self._listener.accept()
                    accepted.setblocking(False)
                    self._lines.append(_Line(accepted, None))
            elif isinstance(ready, _Line):
                gone += self._heard(ready)
        for line in self._lines if self.rank == 0 else ():
            for rank in gone:
                line.say(_GONE, rank)
        return gone

    def _heard(self, line: _Line) -> list[int]:
        try:
            messages = line.messages()
        except OSError:
            self._drop(line)
            return []
        if messages is None:
            self._drop(line)
            return [] if line.rank is None else [line.rank]
        gone = []
        for words in messages:
            if line.rank is None:
                if len(words) != 2 or words[0] != self._token:
                    self._drop(line)
                    break
                line.rank = int(words[1])
            elif words[:1] == [_FAREWELL]:
                self._drop(line)
            elif words[:1] == [_GONE]:
                gone.append(int(words[1]))
        return gone

    def _drop(self, line: _Line) -> None:
        line.socket.close()
        if line in self._lines:
            self._lines.remove(line)

    def wake(self) -> None:
        """Let ``wait`` return from now on, from another thread."""
        self._wake.send(b"\0")

    def close(self) -> None:
        """Say that this rank ends as it should, and let go of all lines."""
        for line in self._lines:
            line.say(_FAREWELL)
        self.forget()

    def forget(self) -> None:
        """Close this process's ends without a word: those of a process that was forked are copies."""
        for end in (*(line.socket for line in self._lines), self._listener, self._wake, self._woken):
            if end is not None:
                end.close()
        self._lines, self._listener = [], None


_open_lines: weakref.WeakSet[Lifelines] = weakref.WeakSet()


def _forget_in_child() -> None:
    # Else a data worker would hold the line of a rank that was killed.
    for lines in list(_open_lines):
        lines.forget()


os.register_at_fork(after_in_child=_forget_in_child)
