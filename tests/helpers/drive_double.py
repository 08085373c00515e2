"""Google Drive's download address as a local server."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

__all__ = ['QUOTA_PAGE', 'DriveDouble', 'drive_double']

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body
# What Drive sends instead of a file whose quota is used up. The status is 200.
QUOTA_PAGE: Reply = (
    200, {'Content-Type': 'text/html; charset=utf-8'},
    b'<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>'
    b'<p>Too many users have viewed or downloaded this file recently.</p></body></html>')


class DriveDouble:
    """The server: `files` by id, `reply` to send instead of a file, and the ids that were `asked` for."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.reply: Reply | None = None
        self.asked: list[str] = []
        self.url = ''

    def answer(self, path: str) -> Reply:
        query = parse_qs(urlsplit(path).query)
        self.asked += query['id']
        if self.reply is not None:
            return self.reply
        assert (query['export'], query['confirm']) == (['download'], ['t'])
        return 200, {'Content-Type': 'application/octet-stream'}, self.files[query['id'][0]].read_bytes()


@contextmanager
def drive_double() -> Iterator[DriveDouble]:
    double = DriveDouble()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = double.answer(self.path)
            self.send_response(status)
            for name, value in ({'Content-Length': str(len(body))} | headers).items():
                if value:  # without a length, the body ends with the connection
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that stop reading
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    double.url = f'http://127.0.0.1:{server.server_port}'
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
