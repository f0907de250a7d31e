"""One request to one server, from the first byte sent to the last one read, within its time."""

import http.client
import ssl
import time
from collections.abc import Mapping, Sequence
from socket import socket as Socket

from fastgrpo.rewards.service.addresses import Address
from fastgrpo.rewards.service.wire import (
    FORMATS,
    WrongAnswer,
    most_bytes_of_scores,
    read_error,
    read_hello,
    read_scores,
)

_HELLO_BYTES = 2**20
_ERROR_BYTES = 2**16
_PIECE = 2**16
_TOO_MANY = 429
_LONGEST_WISH = 120.0  # seconds of a Retry-After that are granted


class Down(Exception):
    """A server gives no answer now, and may later. wish: seconds that it asks to be left alone for.

    The message begins with a verb: the server's url precedes it.
    """

    def __init__(self, message: str, wish: float = 0.0) -> None:
        super().__init__(message)
        self.wish = wish


class Refused(Exception):
    """A server does not want this request, now or later. The message begins with a verb. status: HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Asks one server. Any thread may call it; every request has a connection of its own.

    Without a proxy, whatever the environment says: images go where the settings send them.
    """

    def __init__(self, address: Address, token: str, timeout: float) -> None:
        """timeout: seconds for a whole exchange."""
        self.address, self._token, self._timeout = address, token, timeout
        self._tls = ssl.create_default_context() if address.secure else None

    @property
    def url(self) -> str:
        return self.address.url

    def names(self, timeout: float) -> tuple[str, ...]:
        """The names of its scores. Raises Down, Refused and WrongAnswer."""
        return read_hello(self._exchange("GET", "/", b"", {}, _HELLO_BYTES, min(timeout, self._timeout)))

    def scores(self, body: bytes, form: str, names: Sequence[str], count: int) -> dict[str, list[float]]:
        """The scores of a request's images. body: as encoded in this form. Raises Down, Refused and WrongAnswer."""
        most = most_bytes_of_scores(names, count)
        answer = self._exchange("POST", "/score", body, {"Content-Type": FORMATS[form]}, most, self._timeout)
        return read_scores(answer, names, count)

    def _exchange(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], most: int, timeout: float
    ) -> bytes:
        """The body of an answer 200, of at most `most` bytes."""
        headers = {"Accept": "application/json", **headers}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        end = time.monotonic() + timeout
        connection = self._connection(timeout)
        try:
            try:
                connection.request(method, self.address.path + path, body or None, headers)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # A server that refuses a request may say so before it has read all of it.
            socket = connection.sock  # which the connection forgets where the answer is to close it
            _leave(socket, end)
            answer = connection.getresponse()
            # Without the token, should a server repeat it: what is wrong with an answer is quoted in sentences.
            found = self._without_token(_read(answer, socket, end, most if answer.status == 200 else _ERROR_BYTES))
        except TimeoutError as error:
            raise Down(f"gave no answer within {timeout:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last of a host's name
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Down(f"cannot be asked ({' '.join(said.split())})") from error
        finally:
            connection.close()
        if answer.status == 200:
            return found
        message = f"answered {answer.status}{read_error(found)}"
        if answer.status == _TOO_MANY or answer.status >= 500:
            raise Down(message, _wish(answer.getheader("Retry-After", "")))
        raise Refused(message, answer.status)

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        host, port = self.address.host, self.address.port
        if self._tls:
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _without_token(self, answer: bytes) -> bytes:
        return answer.replace(self._token.encode(), b"***") if self._token else answer


def _leave(socket: Socket, end: float) -> None:
    """Let the next wait take no longer than what is left of the time. Raises TimeoutError where nothing is."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    if socket.fileno() >= 0:
        socket.settimeout(left)


def _read(answer: http.client.HTTPResponse, socket: Socket, end: float, most: int) -> bytes:
    """All of an answer's body. Raises WrongAnswer for one of more than `most` bytes, of which it reads no more."""
    pieces, size = [], 0
    while piece := answer.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise WrongAnswer(f"answered more than {most} bytes")
        _leave(socket, end)
    if answer.length:
        raise ConnectionError("the answer broke off")
    return b"".join(pieces)


def _wish(text: str) -> float:
    """Seconds of a Retry-After; 0 for a date, which needs a clock that agrees."""
    return min(float(text), _LONGEST_WISH) if text.isascii() and text.isdigit() else 0.0
