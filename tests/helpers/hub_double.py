"""A Hugging Face Hub for tests: an HTTP server in this process that keeps model repositories in memory.

The real client, huggingface_hub, talks to it. It answers what our code asks for: uploads in one commit (branches and
pull requests, too), collections, and downloads. It has no Xet, so `point_client_to` switches that off in the client.
"""
import base64
import fnmatch
import hashlib
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import pytest
from huggingface_hub import constants

__all__ = ['Commit', 'HubDouble', 'Repo', 'Reply', 'Request', 'point_client_to']

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body
LFS_PATTERNS = ('*.safetensors', '*.bin', '*.pt', '*.pth')
DATE = '2026-01-01T00:00:00.000Z'


def point_client_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the client in this process ask a server on this machine, without Xet."""
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition('/{')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + ''.join(template[1:]))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')


@dataclass(frozen=True)
class Commit:
    """One commit: the content of all files, and the SHA-256 of those in LFS."""
    sha: str
    message: str
    parent: str | None
    files: dict[str, bytes]
    lfs: dict[str, str]

    def digest(self, path: str) -> str:
        """The digest by which the client compares a file: the SHA-256 in LFS, else that of git."""
        data = self.files[path]
        return self.lfs.get(path) or hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        """A file as the routes for trees and paths describe it."""
        size = len(self.files[path])
        lfs = {'oid': self.lfs[path], 'size': size, 'pointerSize': 134} if path in self.lfs else None
        return {'type': 'file', 'path': path, 'oid': self.digest(path), 'size': size, 'lfs': lfs}


@dataclass
class Repo:
    """A repository: its commits, oldest first, and the refs (`refs/heads/main`, `refs/pr/1`) to some of them."""
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded to LFS, by SHA-256, in a commit or not

    def find(self, revision: str) -> Commit | None:
        """The commit of a SHA, a branch or a full ref name."""
        sha = self.refs.get(revision) or self.refs.get(f'refs/heads/{revision}') or revision
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def head(self, revision: str = 'main') -> Commit:
        """The last commit of a revision that is there."""
        return self.log(revision)[0]

    def log(self, revision: str = 'main') -> list[Commit]:
        """The commits of a revision, newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.find(commit.parent) if commit.parent else None
        return commits

    def last_change(self, revision: str, path: str) -> Commit:
        """The last commit of a revision that changed a file."""
        content = self.head(revision).files[path]
        return list(takewhile(lambda commit: commit.files.get(path) == content, self.log(revision)))[-1]

    def add_commit(
            self, ref: str, parent: Commit | None, message: str, description: str, files: dict[str, bytes],
            lfs: dict[str, str]) -> Commit:
        """Makes a commit, and sets the ref to it."""
        sha = hashlib.sha1(f'{self.id} {len(self.commits)} {message} {description}'.encode()).hexdigest()
        self.commits.append(Commit(sha, message, parent.sha if parent else None, files, lfs))
        self.refs[ref] = sha
        return self.commits[-1]

    def edit(self, path: str, content: bytes, message: str = 'Update a file') -> Commit:
        """Changes a small file on the main branch, as the editor on the Hub does."""
        head = self.head()
        return self.add_commit('refs/heads/main', head, message, '', {**head.files, path: content}, head.lfs)


@dataclass
class Request:
    """A request: the path is quoted, the names of headers are in lower case. `status` is that of the reply."""
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = field(repr=False)
    status: int = 0

    def json(self) -> Any:
        return json.loads(self.body)


class _Refusal(Exception):
    """An error as the Hub sends it: a status and two headers."""

    def __init__(self, status: int, message: str, code: str = '', **content: Any) -> None:
        super().__init__(message)
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.reply = _json({'error': message, **content}, status, headers)


class HubDouble:
    """The server and its state. A context manager.

    Args:
        token: The only token that it accepts. Without a token it shows public repositories only.
        orgs: The organisations that the token may write to.

    Attributes:
        repos: Repositories by `namespace/name`.
        collections: Collections by slug, as the Hub describes them.
        requests: All requests, oldest first.
        ignores_private: Create public repositories only, as a server does that does not know the client's field.
        fault: Called with the method and the path of each request first. It returns a reply, or None to let the
            request pass. If it raises a ConnectionError, the connection ends without a reply; with a
            ConnectionAbortedError, after the request was handled.
    """

    def __init__(self, token: str = 'hf_double', orgs: tuple[str, ...] = ()) -> None:
        self.token = token
        self.orgs = orgs
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.ignores_private = False
        self.fault: Callable[[str, str], Reply | None] | None = None
        self._lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> 'HubDouble':
        self._server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'double': self}))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name='hub-double', daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()

    @property
    def url(self) -> str:
        """The endpoint."""
        assert self._server is not None
        return f'http://127.0.0.1:{self._server.server_port}'

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """Makes a repository with the Hub's own first commit, and with files that look as if we had pushed them."""
        with self._lock:
            repo = self.repos[repo_id] = Repo(repo_id, private)
            first = {'.gitattributes': b''}
            commit = repo.add_commit('refs/heads/main', None, 'initial commit', '', first, {})
            if files:
                lfs = {path: hashlib.sha256(data).hexdigest() for path, data in files.items() if _is_lfs(path)}
                repo.objects |= {digest: files[path] for path, digest in lfs.items()}
                title = 'Upload weights with timm_eca'
                repo.add_commit('refs/heads/main', commit, title, '', first | dict(files), lfs)
            return repo

    def called(self, method: str, part: str = '') -> list[Request]:
        """The requests of a method whose path contains `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def handle(self, request: Request) -> Reply:
        """Records a request, and makes the reply. Raises a ConnectionError to end the connection without a reply."""
        if self._server is None:
            raise ConnectionError('closed')  # the client keeps connections open
        with self._lock:
            self.requests.append(request)
            try:
                reply = (self.fault(request.method, request.path) if self.fault else None) or self._route(request)
            except _Refusal as refusal:
                reply = refusal.reply
            except ConnectionError as error:
                if isinstance(error, ConnectionAbortedError):
                    self._route(request)
                raise
            except Exception:
                reply = _json({'error': f'HubDouble failed:\n{traceback.format_exc()}'}, 501)
            request.status = reply[0]
            return reply

    def _route(self, request: Request) -> Reply:
        header = request.headers.get('authorization')
        if header not in (None, f'Bearer {self.token}'):
            raise _Refusal(401, 'Invalid credentials in Authorization header')  # the client knows this sentence
        if header is None and request.method == 'POST' and 'paths-info' not in request.path:
            raise _Refusal(401, 'Invalid username or password.')
        for route, function in _ROUTES.items():
            match = re.fullmatch(route, f'{request.method.replace("HEAD", "GET")} {request.path}')
            if match:
                return function(self, request, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise _Refusal(501, f'HubDouble has no {request.method} {request.path}')

    def _repo(self, request: Request, repo_id: str) -> Repo:
        repo, known = self.repos.get(repo_id), 'authorization' in request.headers
        if repo is None or (repo.private and not known):
            raise _Refusal(404 if known else 401, 'Repository not found', 'RepoNotFound')
        return repo

    def _commit(self, request: Request, repo_id: str, revision: str) -> Commit:
        commit = self._repo(request, repo_id).find(revision)
        if commit is None:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    def agent_harnesses(self, request: Request) -> Reply:
        return _json({'standardEnvVars': [], 'harnesses': {}})  # the client asks once, for its User-Agent

    def create_repo(self, request: Request) -> Reply:
        wish = request.json()
        repo_id = f'{wish["organization"]}/{wish["name"]}'
        answer = {'url': f'{self.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self.repos:
            raise _Refusal(409, 'You already created this model repo', **answer)
        private = wish.get('visibility') == 'private' or bool(wish.get('private'))  # of huggingface_hub 2, and of 1
        self.add_repo(repo_id, private=private and not self.ignores_private)
        return _json(answer)

    def validate_yaml(self, request: Request) -> Reply:
        from huggingface_hub import ModelCard  # its import reads the environment
        try:
            ModelCard(request.json()['content'])
        except Exception as error:  # of the YAML parser, or of the card's data
            return _json({'errors': [{'message': str(error)}], 'warnings': []}, 400)
        return _json({'errors': [], 'warnings': []})

    def info(self, request: Request, repo_id: str, revision: str = 'main') -> Reply:
        commit = self._commit(request, repo_id, revision)
        siblings = [{'rfilename': path} for path in commit.files]
        return _json({
            'id': repo_id, 'sha': commit.sha, 'private': self.repos[repo_id].private, 'siblings': siblings})

    def tree(self, request: Request, repo_id: str, revision: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        return _json([commit.describe(path) for path in sorted(commit.files)])

    def paths_info(self, request: Request, repo_id: str, revision: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        wanted = parse_qs(request.body.decode())
        found = [commit.describe(path) for path in wanted['paths'] if path in commit.files]
        for file in found:
            last = self.repos[repo_id].last_change(revision, file['path'])
            file['lastCommit'] = {'id': last.sha, 'title': last.message, 'date': DATE}
        return _json(found)

    def create_branch(self, request: Request, repo_id: str, branch: str) -> Reply:
        repo = self._repo(request, repo_id)
        if f'refs/heads/{branch}' in repo.refs:
            raise _Refusal(409, f'Reference already exists: {branch}')
        repo.refs[f'refs/heads/{branch}'] = repo.head().sha
        return _json({})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        return _json({'files': [{
            'path': path, 'uploadMode': 'lfs' if _is_lfs(path) else 'regular', 'shouldIgnore': False,
            # the client leaves a file with this digest out of the commit
            'oid': commit.digest(path) if path in commit.files else None,
        } for path in (file['path'] for file in request.json()['files'])]})

    def lfs_batch(self, request: Request, repo_id: str) -> Reply:
        repo = self._repo(request, repo_id)
        return _json({'transfer': 'basic', 'objects': [{
            **wanted, **({} if wanted['oid'] in repo.objects else {
                'actions': {'upload': {'href': f'{self.url}/{repo_id}.git/double/{wanted["oid"]}'}}}),
        } for wanted in request.json()['objects']]})

    def lfs_put(self, request: Request, repo_id: str, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise _Refusal(400, f'The content of {len(request.body)} bytes has another SHA-256 than {oid}')
        self.repos[repo_id].objects[oid] = request.body  # no token here, as with the signed links of the Hub
        return 200, {}, b''

    def create_commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        repo = self._repo(request, repo_id)
        parent = self._commit(request, repo_id, revision)
        number = sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1
        create_pr = request.query.get('create_pr') in ('1', 'true')
        header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        files, lfs = dict(parent.files), dict(parent.lfs)
        for value in (operation['value'] for operation in operations):
            oid = value.get('oid')  # of a file in LFS
            if oid and oid not in repo.objects:
                raise _Refusal(400, f'{value["path"]} has not been uploaded')
            files[value['path']] = repo.objects[oid] if oid else base64.b64decode(value['content'])
            lfs |= {value['path']: oid} if oid else {}
        summary, description = header['value']['summary'], header['value'].get('description', '')
        ref = f'refs/pr/{number}' if create_pr else f'refs/heads/{revision}'
        commit = repo.add_commit(ref, parent, summary, description, files, lfs)
        address = {'pullRequestUrl': f'{self.url}/{repo_id}/discussions/{number}'} if create_pr else {}
        return _json({'commitOid': commit.sha, 'commitUrl': f'{self.url}/{repo_id}/commit/{commit.sha}', **address})

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        if path not in commit.files:
            raise _Refusal(404, f'{path} does not exist on "{revision}"', 'EntryNotFound')
        return 200, {'X-Repo-Commit': commit.sha, 'ETag': f'"{commit.digest(path)}"'}, commit.files[path]

    def create_collection(self, request: Request) -> Reply:
        wish = request.json()
        if wish['namespace'] not in self.orgs:
            raise _Refusal(403, f'You have no rights in {wish["namespace"]}')
        if len(wish['description']) > 150:
            raise _Refusal(400, 'The description is longer than 150 characters')
        slug = f'{wish["namespace"]}/{wish["title"].lower()}-{"0" * 24}'
        if slug in self.collections:
            raise _Refusal(409, 'This collection already exists', slug=slug)
        self.collections[slug] = {
            **wish, 'slug': slug, 'items': [], 'position': 0, 'theme': 'orange', 'upvotes': 0, 'lastUpdated': DATE,
            'owner': {'name': wish['namespace'], 'type': 'org'}}
        return _json(self.collections[slug])

    def collection(self, request: Request, slug: str) -> Reply:
        return _json(self.collections[slug])

    def add_collection_item(self, request: Request, slug: str) -> Reply:
        wish, items = request.json()['item'], self.collections[slug]['items']
        self._repo(request, wish['id'])
        if wish['id'] in [item['id'] for item in items]:
            raise _Refusal(409, 'This item is in the collection already')
        items.append({'_id': f'{len(items):024x}', 'id': wish['id'], 'type': wish['type'], 'position': len(items)})
        return _json(self.collections[slug])


_REPO, _REV, _SLUG = r'(?P<repo_id>[^/]+/[^/]+)', r'(?P<revision>[^/]+)', r'(?P<slug>[^/]+/[^/]+)'
_ROUTES: dict[str, Callable[..., Reply]] = {
    'GET /api/agent-harnesses': HubDouble.agent_harnesses,
    'POST /api/repos/create': HubDouble.create_repo,
    'POST /api/validate-yaml': HubDouble.validate_yaml,
    'POST /api/collections': HubDouble.create_collection,
    f'GET /api/collections/{_SLUG}': HubDouble.collection,
    f'POST /api/collections/{_SLUG}/items': HubDouble.add_collection_item,
    f'GET /api/models/{_REPO}': HubDouble.info,
    f'GET /api/models/{_REPO}/revision/{_REV}': HubDouble.info,
    f'GET /api/models/{_REPO}/tree/{_REV}': HubDouble.tree,
    f'POST /api/models/{_REPO}/paths-info/{_REV}': HubDouble.paths_info,
    f'POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)': HubDouble.create_branch,
    f'POST /api/models/{_REPO}/preupload/{_REV}': HubDouble.preupload,
    f'POST /api/models/{_REPO}/commit/{_REV}': HubDouble.create_commit,
    f'POST /{_REPO}[.]git/info/lfs/objects/batch': HubDouble.lfs_batch,
    f'PUT /{_REPO}[.]git/double/(?P<oid>[0-9a-f]{{64}})': HubDouble.lfs_put,
    f'GET /{_REPO}/resolve/{_REV}/(?P<path>.+)': HubDouble.resolve,
}


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that are gone."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request and writes the double's reply."""
    double: HubDouble
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # a reply is two writes: the second would wait for the client

    def _handle(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get('content-length', 0)))
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers, body)
        try:
            status, reply_headers, content = self.double.handle(request)
        except ConnectionError:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in ({'Content-Length': str(len(content))} | reply_headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: `HubDouble.requests` has it all."""


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return status, {'Content-Type': 'application/json', **(headers or {})}, json.dumps(content).encode()


def _is_lfs(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in LFS_PATTERNS)
