"""Notices within moments that a process of the job has gone, whatever the others do meanwhile.

Every rank holds a connection to rank 0. The system closes the connections of a process that dies,
at once and also of one that had no time to say anything; rank 0 passes it on over the others.
Collectives notice it too, but only between processes that are connected already: while the ranks
make their process groups, the peers of one that died would wait for it until their timeout.
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

_KEY, _WELCOME, _FAREWELL, _GONE = "lifelines", "welcome", "bye", "gone"
#: To connect to a host takes milliseconds; one that answers nothing is behind a firewall.
_CONNECT_SECONDS = 20.0
#: Times that a rank tries to have its line again, the pause before each, and how long each may take.
_ATTEMPTS, _PAUSE_SECONDS, _AGAIN_SECONDS = 5, 0.2, 2.0
#: A rank says who it is as soon as it is connected. Whoever does not is a stranger: a port scanner, a
#: health check. So many of them may wait, for so long; the longest waiting makes room for the next.
MOST_STRANGERS, STRANGER_SECONDS = 64, 5.0
#: So that a flood of them takes no core: so many in such a time, then the rest wait for the next; an
#: error makes a longer pause. No pause before: the port's queue is short, and whoever finds it full
#: waits a second for the next try.
_AT_ONCE, _WINDOW_SECONDS, _ERROR_SECONDS = 64, 0.1, 1.0
_LONGEST_GREETING, _LONGEST_MESSAGE = 100, 1000


@dataclass
class _Line:
    """A connection to ``rank``, which is None until it has said who it is; ``unread`` is half a message.

    ``welcome``: of a line to rank 0, whether that one knows who is at this end.
    """

    socket: socket.socket
    rank: int | None
    unread: bytes = b""
    since: float = field(default_factory=time.monotonic)
    welcome: bool = False

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
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None
        if not data:
            return None
        *whole, self.unread = (self.unread + data).split(b"\n")
        if len(self.unread) > (_LONGEST_GREETING if self.rank is None else _LONGEST_MESSAGE):
            raise OSError("no message of ours is that long")
        return [message.decode(errors="replace").split() for message in whole]


class PeerMonitor:
    """The lines of this rank: of rank 0 to every other, of the others to rank 0.

    ``store`` is where the ranks meet; ``rank`` of ``world_size`` is this process. A line that cannot
    be made (a firewall) is told in ``problem``, and does without.

    Raises LostProcess if rank 0, on this same host, has gone before.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self.rank, self.world_size, self.problem = rank, world_size, ""
        self._listener: socket.socket | None = None
        self._listens_from, self._attempts = 0.0, 0
        self._window_ends, self._accepted = 0.0, 0
        self._lines: list[_Line] = []
        self._strangers: list[_Line] = []
        self._wake, self._woken = socket.socketpair()
        if world_size > 1:
            self._listen(store) if rank == 0 else self._find(store)
        _open_lines.add(self)

    def _listen(self, store: Store) -> None:
        host = "127.0.0.1" if network.on_one_host(os.environ.get("MASTER_ADDR", "")) else ""
        dual = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(
            (host, 0), family=family, backlog=self.world_size, dualstack_ipv6=dual
        )
        self._listener.setblocking(False)
        # Whoever knows the token has it from the store: a line of a stranger means nothing.
        self._token = secrets.token_hex(16)
        store.set(_KEY, f"{self._listener.getsockname()[1]} {self._token}")

    def _find(self, store: Store) -> None:
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
        line = _Line(socket.create_connection(self._address, seconds), 0)
        line.socket.setblocking(False)
        line.say(self._token, self.rank)
        self._lines.append(line)

    def _connect_again(self) -> list[int]:
        """After the network has failed, or rank 0 has taken this one for a stranger: 0 if it has gone."""
        while self._attempts < _ATTEMPTS:
            self._attempts += 1
            time.sleep(_PAUSE_SECONDS)
            try:
                self._connect(_AGAIN_SECONDS)
                break
            except ConnectionRefusedError:
                return [0]
            except OSError:
                continue
        return []

    def wait(self, seconds: float) -> list[int]:
        """Wait so long, or until something happens; the ranks that turn out to have gone."""
        gone: list[int] = []
        ends: list[Any] = [self._woken, *self._lines]
        if self._listener is not None:
            pause = self._listens_from - time.monotonic()
            ends += [self._listener, *self._strangers] if pause <= 0 else []
            seconds = min(seconds, pause if pause > 0 else 1.0 if self._strangers else seconds)
        for ready in connection.wait(ends, seconds):
            if self._listener is not None and ready is self._listener:
                self._accept(self._listener)
            elif isinstance(ready, _Line):
                gone += self._heard(ready)
        for line in [line for line in self._strangers if time.monotonic() - line.since > STRANGER_SECONDS]:
            self._drop(line)
        for line in self._lines if self.rank == 0 else ():
            for rank in gone:
                line.say(_GONE, rank)
        return gone

    def _accept(self, listener: socket.socket) -> None:
        now = time.monotonic()
        if now >= self._window_ends:
            self._window_ends, self._accepted = now + _WINDOW_SECONDS, 0
        while self._accepted < _AT_ONCE:
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors are left, say: those that wait would be reported again at once
                self._listens_from = time.monotonic() + _ERROR_SECONDS
                return
            self._accepted += 1
            accepted.setblocking(False)
            if len(self._strangers) >= MOST_STRANGERS:
                self._drop(self._strangers[0])
            self._strangers.append(_Line(accepted, None))
            self._heard(self._strangers[-1])  # a rank has said who it is by now
        self._listens_from = self._window_ends

    def _heard(self, line: _Line) -> list[int]:
        try:
            messages = line.messages()
        except OSError:
            self._drop(line)
            return self._connect_again() if line.rank == 0 else []
        if messages is None:
            self._drop(line)
            if line.rank == 0 and not line.welcome:
                return self._connect_again()
            return [] if line.rank is None else [line.rank]
        gone = []
        for words in messages:
            if line.rank is None:
                if not self._identify(line, words):
                    break
            elif words == [_WELCOME]:
                line.welcome, self._attempts = True, 0
            elif words == [_FAREWELL]:
                self._drop(line)
            elif len(words) == 2 and words[0] == _GONE and words[1].isdecimal():
                gone.append(int(words[1]))
        return gone

    def _identify(self, line: _Line, words: list[str]) -> bool:
        """Whether the first message of a line says whose it is; any other is a stranger's, who is dropped."""
        known = len(words) == 2 and hmac.compare_digest(words[0].encode(), self._token.encode())
        if not (known and words[1].isdecimal() and 0 < int(words[1]) < self.world_size):
            self._drop(line)
            return False
        line.rank = int(words[1])
        for old in [old for old in self._lines if old.rank == line.rank]:
            self._drop(old)  # its rank has had to connect again
        self._strangers.remove(line)
        self._lines.append(line)
        line.say(_WELCOME)
        return True

    def _drop(self, line: _Line) -> None:
        line.socket.close()
        for lines in (self._lines, self._strangers):
            if line in lines:
                lines.remove(line)

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
        lines = (line.socket for line in (*self._lines, *self._strangers))
        for end in (*lines, self._listener, self._wake, self._woken):
            if end is not None:
                end.close()
        self._lines, self._strangers, self._listener = [], [], None


_open_lines: weakref.WeakSet[PeerMonitor] = weakref.WeakSet()


def _forget_in_child() -> None:
    # Else a data worker would hold the line of a rank that was killed.
    for lines in list(_open_lines):
        lines.forget()


os.register_at_fork(after_in_child=_forget_in_child)
