"""Google Drive's download address as a local server."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.local_server import Reply, Request, serve

__all__ = ['QUOTA_PAGE', 'DriveDouble', 'drive_double']

# What Drive sends instead of a file whose quota is used up. The status is 200.
QUOTA_PAGE: Reply = (
    200, {'Content-Type': 'text/html; charset=utf-8'},
    b'<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>'
    b'<p>Too many users have viewed or downloaded this file recently.</p></body></html>')


class DriveDouble:
    """The server: `files` by id, `reply` to send instead of a file but `other`, and the ids that were `asked` for."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.reply: Reply | None = None
        self.asked: list[str] = []
        self.url = ''  # with a place for the id

    def answer(self, request: Request) -> Reply:
        self.asked.append(request.query['id'])
        if self.reply is not None and request.query['id'] != 'other':
            return self.reply
        return 200, {'Content-Type': 'application/octet-stream'}, self.files[request.query['id']].read_bytes()


@contextmanager
def drive_double() -> Iterator[DriveDouble]:
    double = DriveDouble()
    with serve(double.answer) as url:
        double.url = url + '/download?id={}&export=download&confirm=t'
        yield double
