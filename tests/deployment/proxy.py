"""A network that can fail: a TCP proxy on loopback that delays, cuts and swallows."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Forwards connections to a port, as long as `mode` says so.

    `pass`; `delay`: every piece comes 0.2 s late; `freeze`: they stay open and nothing comes through, as
    behind a firewall that forgot them. Or it is `cut`, and later begins again.
    """

    def __init__(self, target: int) -> None:
        self.mode, self._target, self.port = "pass", target, 0
        self._open: set[socket.socket] = set()
        self.begin()

    def begin(self) -> None:
        """Listen, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        end(self._listener)
        for one in list(self._open):
            end(one)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                if self.mode == "delay":
                    time.sleep(0.2)
                while self.mode == "freeze":
                    time.sleep(0.05)
                sink.sendall(piece)
        end(source)
        end(sink)
        self._open -= {source, sink}


def end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
