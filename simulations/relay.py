"""A relay on 127.0.0.1 that counts what passes: how many bytes really cross between sites and server, TLS and all."""

import select
import socket
import threading
from contextlib import suppress


class Relay:
    """Passes every connection on to a port of 127.0.0.1, until it is left; `port` is where it listens itself.

    Attributes:
        to_server: bytes that went towards that port so far.
        from_server: bytes that came back.
    """

    def __init__(self, server_port: int) -> None:
        self.to_server = self.from_server = 0
        self._server = ("127.0.0.1", server_port)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread; closing alone does not
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        # Either end may go away in the middle: then so does the other.
        with near, suppress(OSError), socket.create_connection(self._server) as far:
            while True:
                for one in select.select([near, far], [], [])[0]:
                    if not (data := one.recv(1 << 18)):
                        return
                    (far if one is near else near).sendall(data)
                    with self._lock:
                        self.to_server += len(data) if one is near else 0
                        self.from_server += len(data) if one is far else 0
