"""One stream of messages between the engine's process and a rank, over a socket."""

from __future__ import annotations

import hmac
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adkit.contract import ShardingError
from adkit.runtime.ranks.messages import decode, encode

_LENGTH = struct.Struct("<q")
_TOKEN_BYTES = 32


class Link:
    """Messages over a connected stream socket; raises EOFError when the other end is gone.

    ``timeout`` (seconds) bounds a send whose reader does not read: TimeoutError.
    """

    def __init__(self, sock: socket.socket, timeout: float | None = None) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout)
        self._socket = sock

    def settimeout(self, timeout: float | None) -> None:
        """Change it."""
        self._socket.settimeout(timeout)

    def fileno(self) -> int:
        """To wait for messages with ``multiprocessing.connection.wait``; -1 once closed."""
        return self._socket.fileno()

    def send(self, message: Any, with_draws: bool = True) -> None:
        """Send one message."""
        body = encode(message, with_draws)
        with uninterrupted():
            try:
                self._socket.sendall(_LENGTH.pack(len(body)) + body)
            except (BrokenPipeError, ConnectionError) as error:
                raise EOFError(str(error)) from error

    def receive(self, pinned: bool = False) -> Any:
        """The next message; waits for it."""
        with uninterrupted():
            length = _LENGTH.unpack(self._read(_LENGTH.size))[0]
            return decode(self._read(length), pinned)

    def _read(self, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        at = 0
        while at < size:
            try:
                count = self._socket.recv_into(data[at:])
            except ConnectionError as error:
                raise EOFError(str(error)) from error
            if not count:
                raise EOFError("the other end is closed")
            at += count
        return data

    def close(self) -> None:
        """Close this end; the other reads EOFError."""
        self._socket.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt (Ctrl-C) in the block takes effect after it: half a message would end the conversation."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])


class Door:
    """A port on ``host`` (0: a free one) at which ranks knock with a token that only they were given.

    Raises ShardingError when the port is taken.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._socket = listen(host, port)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.token = secrets.token_bytes(_TOKEN_BYTES)

    def let_in(self, timeout: float) -> Link:
        """The next that knows the token; TimeoutError when nobody comes in time (seconds)."""
        self._socket.settimeout(timeout)
        while True:
            sock, _ = self._socket.accept()
            sock.settimeout(timeout)
            given = b""
            while len(given) < _TOKEN_BYTES and (more := sock.recv(_TOKEN_BYTES - len(given))):
                given += more
            if hmac.compare_digest(given, self.token):
                return Link(sock, timeout)
            sock.close()

    def close(self) -> None:
        """Nobody comes in any more."""
        self._socket.close()


def knock(address: tuple[str, int], token: bytes, timeout: float) -> Link:
    """A rank's end of a link, made at a :class:`Door`."""
    sock = socket.create_connection(address, timeout)
    sock.sendall(token)
    return Link(sock)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on a port of ``host``; ShardingError when it cannot be had."""
    try:
        return socket.create_server((host, port), backlog=64)
    except OSError as error:
        raise ShardingError(
            f"port {port} of {host} cannot be had ({error.strerror or error}); give another, or none: then a free "
            "one is taken"
        ) from error
