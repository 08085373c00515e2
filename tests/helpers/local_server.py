"""An HTTP server on this machine, for the doubles of the Hub and of Google Drive."""
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

__all__ = ['Reply', 'Request', 'serve']

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


@dataclass
class Request:
    """A request: the path is quoted, the names of headers are in lower case. `status` is that of the reply."""
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = field(repr=False)
    status: int = 0


@contextmanager
def serve(answer: Callable[[Request], Reply]) -> Iterator[str]:
    """Serves the replies that a function gives, and yields the URL. A ConnectionError ends the connection instead."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        disable_nagle_algorithm = True  # a reply is two writes: the second would wait for the client

        def _handle(self) -> None:
            url, headers = urlsplit(self.path), {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get('content-length', 0)))
            try:
                if closed.is_set():  # clients keep connections open
                    raise ConnectionError
                status, headers, content = answer(
                    Request(self.command, url.path, dict(parse_qsl(url.query)), headers, body))
            except ConnectionError:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in ({'Content-Length': str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

    closed = threading.Event()
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that are gone
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        closed.set()
        server.shutdown()
        server.server_close()
