"""Google Drive's download address as a local server, which also fails as Drive, and what stands before it, does."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

__all__ = ['FAILURES', 'DriveDouble', 'drive_double']

_HTML = {'Content-Type': 'text/html; charset=utf-8'}
Reply = tuple[int, dict[str, str], bytes]

# What Drive, or what stands before it, answers instead of the file. The pages have the form of the real ones.
FAILURES: dict[str, Reply] = {
    'quota': (200, _HTML, b'<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>'
              b'<p>Too many users have viewed or downloaded this file recently.</p></body></html>'),
    'confirmation': (200, _HTML, b'<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>'
                     b'<form id="download-form" method="get"><input name="confirm" value="t"></form></html>'),
    'page without a title': (200, _HTML, b'\n  <html><body>Sign in</body></html>'),
    'page called a file': (200, {'Content-Type': 'application/octet-stream'}, b'<html><title>Login\x07</title></html>'),
    'forbidden': (403, _HTML, b'<html>403. That is an error.</html>'),
    'not found': (404, _HTML, b''),
    'too many requests': (429, {'Retry-After': '3600'}, b''),
    'internal error': (500, {}, b'oops'),
    'proxy wants a login': (511, _HTML, b'<html>Network Authentication Required</html>'),
    'redirect in a circle': (302, {'Location': '/download?id=again'}, b''),
    'empty': (200, {}, b''),
    'no checkpoint': (200, {}, bytes(range(256)) * 10),
    'bad length': (200, {'Content-Length': 'many'}, b'PK'),
}


class DriveDouble:
    """The server: `files` are what it sends by id, `reply` what it answers instead, `asked` the ids asked for."""

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
                if value:  # an empty length: the end of the connection is that of the body
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
