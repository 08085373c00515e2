"""A Hugging Face Hub of one process: a local HTTP server that keeps model repositories in memory.

It answers the real client, `huggingface_hub`, for what an upload calls (`create_repo`, `create_branch`,
`create_commit` and the functions upon it, pull requests included; `create_collection`, `add_collection_item`) and for
reading the result back (`model_info`, `list_repo_tree`, `get_paths_info`, `list_repo_refs`, `list_repo_commits`,
`hf_hub_download`, `snapshot_download`, `get_collection`).
It does not speak Xet, hence the client has to be told not to, as `point_client_to` does.
"""
import base64
import binascii
import fnmatch
import hashlib
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import pytest
from huggingface_hub import constants

__all__ = ['Commit', 'HubDouble', 'Repo', 'Request', 'point_client_to']

Reply = tuple[int, dict[str, str], bytes]
Fault = Callable[[str, str], Reply | None]

# Some of the patterns in the .gitattributes of a new repository on the Hub. Of other files, those above the limit go
# to LFS too, for the Hub refuses them as git blobs.
LFS_PATTERNS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.ckpt', '*.onnx', '*.npz', '*.zip', '*.tar.*')
REGULAR_LIMIT = 10 * 1024 * 1024


def point_client_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the client in this process ask a server on this machine, without Xet."""
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition('/{')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + ''.join(template[1:]))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')


@dataclass(frozen=True)
class Commit:
    """One commit: all files at that state, and of those in LFS also the SHA-256."""
    sha: str
    message: str
    description: str
    parent: str | None
    date: str
    files: dict[str, bytes]
    lfs: dict[str, str]

    def oid(self, path: str) -> str:
        """What git names the blob: for a file in LFS that is the hash of its pointer."""
        if path in self.lfs:
            return _blob_oid(_pointer(self.lfs[path], len(self.files[path])))
        return _blob_oid(self.files[path])


@dataclass
class Repo:
    """A repository: its commits, oldest first, and the refs (`refs/heads/main`, `refs/pr/1`) that name some of them."""
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded to LFS, by SHA-256, committed or not
    announced: set[str] = field(default_factory=set)  # SHA-256 that an LFS batch has asked the client to upload

    def find(self, revision: str) -> Commit | None:
        """The commit that a SHA, a branch or a full ref name stands for."""
        sha = self.refs.get(revision) or self.refs.get(f'refs/heads/{revision}') or revision
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def head(self, revision: str = 'main') -> Commit:
        """Like `find`, for a revision that has to be there."""
        commit = self.find(revision)
        if commit is None:
            raise KeyError(f'{self.id} has no revision {revision}, but {sorted(self.refs)}')
        return commit

    def log(self, revision: str = 'main') -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = []
        commit: Commit | None = self.head(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.find(commit.parent) if commit.parent else None
        return commits

    def add_commit(
            self,
            ref: str,
            parent: Commit | None,
            message: str,
            description: str,
            files: dict[str, bytes],
            lfs: dict[str, str],
    ) -> Commit:
        """Makes a commit and sets the ref to it."""
        parent_sha = parent.sha if parent else None
        blobs = sorted((path, _blob_oid(data)) for path, data in files.items())
        state = [self.id, len(self.commits), parent_sha, message, blobs]
        commit = Commit(
            sha=hashlib.sha1(json.dumps(state).encode()).hexdigest(),
            message=message,
            description=description,
            parent=parent_sha,
            date=datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z'),
            files=files,
            lfs=lfs,
        )
        self.commits.append(commit)
        self.refs[ref] = commit.sha
        return commit


@dataclass
class Request:
    """A request as it came in (path still quoted, header names in lower case) and the status of the reply."""
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    size: int
    status: int = 0


@dataclass
class _Call:
    """What a route works on."""
    body: bytes
    query: dict[str, str]
    headers: Mapping[str, str]
    authorized: bool

    def json(self) -> Any:
        return json.loads(self.body)


class _Refusal(Exception):
    """An error as the Hub tells it: by status and two headers."""

    def __init__(self, status: int, message: str, code: str = '', commit: str = '', **content: Any) -> None:
        super().__init__(message)
        headers = {'X-Error-Message': message.encode('ascii', 'replace').decode().replace('\n', ' ')}
        if code:
            headers['X-Error-Code'] = code
        if commit:
            headers['X-Repo-Commit'] = commit
        self.reply = _json({'error': message, **content}, status, headers)


class HubDouble:
    """The server, and the state that it serves. A context manager.

    Args:
        token: The one token that is accepted. Another is refused (401), none at all reads public repositories only.
        user: Whom the token belongs to.
        orgs: The organizations of this user, as `whoami` lists them.

    Attributes:
        repos: Repositories by `namespace/name`.
        collections: Collections by their slugs, as the Hub describes them.
        requests: All requests, oldest first.
        fault: Called with method and path (quoted, without the query) of each request before anything is done with it.
            What it returns (status, headers, body) is the reply, None lets the request pass, and if it raises
            `ConnectionError`, the connection breaks without a reply; if that is a `ConnectionAbortedError`, what was
            asked for is done before. Note that the client retries some calls upon a broken connection and upon 408,
            429 and 5xx other than 501, for half a minute if that stays.
    """

    def __init__(self, token: str = 'hf_double', user: str = 'tester', orgs: tuple[str, ...] = ()) -> None:
        self.token = token
        self.user = user
        self.orgs = orgs
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.fault: Fault | None = None
        self._lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> 'HubDouble':
        self._server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'double': self}))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name='hub-double', daemon=True).start()
        return self

    def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            tb: TracebackType | None,
    ) -> None:
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()

    @property
    def url(self) -> str:
        """The endpoint, without a slash at the end."""
        assert self._server is not None, 'HubDouble has to be entered first'
        return f'http://127.0.0.1:{self._server.server_port}'

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """Makes a repository with the first commit that the Hub makes, and with one more that adds the files."""
        with self._lock:
            repo = Repo(repo_id, private)
            attributes = ''.join(f'{pattern} filter=lfs diff=lfs merge=lfs -text\n' for pattern in LFS_PATTERNS)
            first = {'.gitattributes': attributes.encode()}
            commit = repo.add_commit('refs/heads/main', None, 'initial commit', '', first, {})
            if files:
                lfs = {}
                for path, data in files.items():
                    if _is_lfs(path, len(data)):
                        lfs[path] = hashlib.sha256(data).hexdigest()
                        repo.objects[lfs[path]] = data
                repo.add_commit('refs/heads/main', commit, 'Add files', '', first | dict(files), lfs)
            self.repos[repo_id] = repo
            return repo

    def called(self, method: str, part: str = '') -> list[Request]:
        """The requests of a method whose path contains `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def handle(self, request: Request, body: bytes) -> Reply:
        """The reply to a request, which is recorded.

        Raises:
            ConnectionError: The connection is to be closed without a reply, as `fault` wants it.
        """
        if self._server is None:
            raise ConnectionError('closed')  # a connection that the client has kept open
        with self._lock:
            self.requests.append(request)
            try:
                reply = (self.fault(request.method, request.path) if self.fault else None) or self._route(request, body)
            except _Refusal as refusal:
                reply = refusal.reply
            except ConnectionAbortedError:
                self._route(request, body)
                raise
            except ConnectionError:
                raise
            except Exception:
                # 501, since the client takes its time to repeat a call upon most others of the 500s.
                reply = _json({'error': f'HubDouble failed:\n{traceback.format_exc()}'}, 501)
            request.status = reply[0]
            return reply

    def _route(self, request: Request, body: bytes) -> Reply:
        for method, pattern, function in _ROUTES:
            match = pattern.fullmatch(request.path)
            if match and method == request.method.replace('HEAD', 'GET'):
                call = _Call(body, request.query, request.headers, self._is_authorized(request.headers))
                return function(self, call, **{name: unquote(value or '') for name, value in match.groupdict().items()})
        raise _Refusal(501, f'HubDouble has no {request.method} {request.path}')

    def _is_authorized(self, headers: Mapping[str, str]) -> bool:
        if 'authorization' not in headers:
            return False
        if headers['authorization'] != f'Bearer {self.token}':
            # By this very message the client tells a bad token from a repository that is not there.
            raise _Refusal(401, 'Invalid credentials in Authorization header')
        return True

    def _repo(self, call: _Call, repo_id: str, write: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        if not call.authorized and (repo is None or repo.private):
            raise _Refusal(401, 'Invalid username or password.', 'RepoNotFound')
        if repo is None:
            raise _Refusal(404, 'Repository not found', 'RepoNotFound')
        if write and not call.authorized:
            raise _Refusal(401, 'Invalid username or password.')
        return repo

    def _commit(self, call: _Call, repo_id: str, revision: str) -> Commit:
        commit = self._repo(call, repo_id).find(revision)
        if commit is None:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    def agent_harnesses(self, call: _Call) -> Reply:
        # The client asks for this once, when it first makes up its User-Agent.
        return _json({'standardEnvVars': [], 'harnesses': {}})

    def whoami(self, call: _Call) -> Reply:
        if not call.authorized:
            raise _Refusal(401, 'Invalid username or password.')
        return _json({
            'type': 'user',
            'id': 'double',
            'name': self.user,
            'fullname': self.user,
            'orgs': [{'type': 'org', 'name': name, 'fullname': name, 'roleInOrg': 'admin'} for name in self.orgs],
            'auth': {'type': 'access_token', 'accessToken': {'displayName': 'double', 'role': 'write'}},
        })

    def create_repo(self, call: _Call) -> Reply:
        if not call.authorized:
            raise _Refusal(401, 'Invalid username or password.')
        wish = call.json()
        if wish.get('type', 'model') not in (None, 'model'):
            raise _Refusal(501, f'HubDouble keeps models only, not a {wish["type"]}')
        repo_id = f'{wish.get("organization") or self.user}/{wish["name"]}'
        answer = {'url': f'{self.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self.repos:
            raise _Refusal(409, 'You already created this model repo', **answer)
        # huggingface_hub 2 sends a visibility, 1 a bool.
        self.add_repo(repo_id, private=wish.get('visibility') == 'private' or bool(wish.get('private')))
        return _json(answer)

    def validate_yaml(self, call: _Call) -> Reply:
        # Not at the top: the constants of the client depend on the environment at the time of its import.
        from huggingface_hub import ModelCard
        content = call.json()['content']
        if not re.match(r'\s*---[ \t]*\r?\n', content):
            return _json({'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata in repo card'}]})
        try:
            ModelCard(content)
        except Exception as error:  # whatever the YAML parser or the check of its result may raise
            return _json({'errors': [{'message': str(error)}], 'warnings': []}, 400)
        return _json({'errors': [], 'warnings': []})

    def info(self, call: _Call, repo_id: str, revision: str = 'main') -> Reply:
        commit = self._commit(call, repo_id, revision)
        repo = self.repos[repo_id]
        siblings = []
        for path in sorted(commit.files):
            sibling: dict[str, Any] = {'rfilename': path}
            if _flag(call.query.get('blobs')):
                sibling |= {'size': len(commit.files[path]), 'blobId': commit.oid(path)}
                if path in commit.lfs:
                    sibling['lfs'] = _lfs_info(commit, path, 'sha256')
            siblings.append(sibling)
        return _json({
            'id': repo_id,
            'modelId': repo_id,
            'author': repo_id.split('/')[0],
            'sha': commit.sha,
            'lastModified': commit.date,
            'createdAt': repo.commits[0].date,
            'private': repo.private,
            'gated': False,
            'disabled': False,
            'downloads': 0,
            'likes': 0,
            'tags': [],
            'siblings': siblings,
        })

    def tree(self, call: _Call, repo_id: str, revision: str, folder: str) -> Reply:
        commit = self._commit(call, repo_id, revision)
        prefix = f'{folder.strip("/")}/' if folder.strip('/') else ''
        entries = list(_entries(commit, prefix))
        if prefix and not entries:
            raise _Refusal(404, f'{folder} does not exist on "{revision}"', 'EntryNotFound', commit.sha)
        if not _flag(call.query.get('recursive')):
            entries = [entry for entry in entries if '/' not in entry['path'][len(prefix):]]
        return _json(entries)

    def paths_info(self, call: _Call, repo_id: str, revision: str) -> Reply:
        commit = self._commit(call, repo_id, revision)
        is_json = 'json' in call.headers.get('content-type', '')
        wanted = call.json()['paths'] if is_json else parse_qs(call.body.decode())['paths']
        names = {path.strip('/') for path in wanted}
        return _json([entry for entry in _entries(commit) if entry['path'] in names])

    def refs(self, call: _Call, repo_id: str) -> Reply:
        groups: dict[str, list[dict[str, str]]] = {'branches': [], 'converts': [], 'tags': []}
        kinds = {'refs/heads/': 'branches'}
        if _flag(call.query.get('include_prs')):
            groups['pullRequests'] = []
            kinds['refs/pr/'] = 'pullRequests'
        for ref, sha in self._repo(call, repo_id).refs.items():
            for prefix, kind in kinds.items():
                if ref.startswith(prefix):
                    groups[kind].append({'name': ref.removeprefix(prefix), 'ref': ref, 'targetCommit': sha})
        return _json(groups)

    def commits(self, call: _Call, repo_id: str, revision: str) -> Reply:
        log = self.repos[repo_id].log(self._commit(call, repo_id, revision).sha)
        authors = [{'user': self.user}]
        return _json([{
            'id': commit.sha, 'title': commit.message, 'message': commit.description, 'date': commit.date,
            'authors': authors,
        } for commit in log])

    def create_branch(self, call: _Call, repo_id: str, branch: str) -> Reply:
        repo = self._repo(call, repo_id, write=True)
        ref = f'refs/heads/{branch}'
        if ref in repo.refs:
            raise _Refusal(409, f'Reference already exists: {ref}')
        repo.refs[ref] = self._commit(call, repo_id, call.json().get('startingPoint') or 'main').sha
        return _json({})

    def preupload(self, call: _Call, repo_id: str, revision: str) -> Reply:
        self._repo(call, repo_id, write=True)
        commit = self._commit(call, repo_id, revision)
        answers = []
        for file in call.json()['files']:
            path = file['path']
            answer = {
                'path': path,
                'uploadMode': 'lfs' if _is_lfs(path, file['size']) else 'regular',
                'shouldIgnore': False,
            }
            if path in commit.files:
                # The client compares this with its own file, and leaves out of the commit what is the same.
                answer['oid'] = commit.lfs.get(path) or commit.oid(path)
            answers.append(answer)
        return _json({'files': answers, 'commitOid': commit.sha})

    def create_collection(self, call: _Call) -> Reply:
        if not call.authorized:
            raise _Refusal(401, 'Invalid username or password.')
        wish = call.json()
        if wish['namespace'] not in (self.user, *self.orgs):
            raise _Refusal(403, f'You have no rights in {wish["namespace"]}')
        if len(wish.get('description', '')) > 150:
            raise _Refusal(400, 'The description is longer than 150 characters')
        name = re.sub('[^a-z0-9]+', '-', wish['title'].lower())
        slug = f'{wish["namespace"]}/{name}-{hashlib.sha1(name.encode()).hexdigest()[:24]}'
        if slug in self.collections:
            raise _Refusal(409, 'This collection already exists', slug=slug)
        self.collections[slug] = {
            'slug': slug, 'title': wish['title'], 'description': wish.get('description'), 'items': [], 'position': 0,
            'owner': {'name': wish['namespace'], 'type': 'org'}, 'private': wish['private'], 'theme': 'orange',
            'upvotes': 0, 'lastUpdated': datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z'),
        }
        return _json(self.collections[slug])

    def collection(self, call: _Call, slug: str) -> Reply:
        if slug not in self.collections:
            raise _Refusal(404, 'Collection not found')
        return _json(self.collections[slug])

    def add_collection_item(self, call: _Call, slug: str) -> Reply:
        self.collection(call, slug)
        if not call.authorized:
            raise _Refusal(401, 'Invalid username or password.')
        wish, items = call.json()['item'], self.collections[slug]['items']
        self._repo(call, wish['id'])
        if wish['id'] in [item['id'] for item in items]:
            raise _Refusal(409, 'This item is in the collection already')
        items.append({'_id': f'{len(items):024x}', 'id': wish['id'], 'type': wish['type'], 'position': len(items)})
        return _json(self.collections[slug])

    def lfs_batch(self, call: _Call, repo_id: str) -> Reply:
        repo = self._repo(call, repo_id, write=True)
        objects = []
        for wanted in call.json()['objects']:
            answer = {'oid': wanted['oid'], 'size': wanted['size']}
            if wanted['oid'] not in repo.objects:
                repo.announced.add(wanted['oid'])
                answer['actions'] = {
                    'upload': {'href': f'{self.url}/{repo_id}.git/double/{wanted["oid"]}'},
                    'verify': {'href': f'{self.url}/{repo_id}.git/info/lfs/objects/verify'},
                }
            objects.append(answer)
        return _json({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, call: _Call, repo_id: str, oid: str) -> Reply:
        # No token here, as with the signed links of the Hub.
        repo = self.repos.get(repo_id)
        if repo is None or oid not in repo.announced:
            raise _Refusal(403, 'This object has not been announced by a batch call')
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise _Refusal(400, f'The content of {len(call.body)} bytes has another SHA-256 than {oid}')
        repo.objects[oid] = call.body
        return 200, {'ETag': f'"{oid}"'}, b''

    def lfs_verify(self, call: _Call, repo_id: str) -> Reply:
        wanted = call.json()
        data = self._repo(call, repo_id, write=True).objects.get(wanted['oid'])
        if data is None or len(data) != wanted['size']:
            raise _Refusal(404, f'LFS object {wanted["oid"]} of {wanted["size"]} bytes has not been uploaded')
        return _json({'success': True})

    def create_commit(self, call: _Call, repo_id: str, revision: str) -> Reply:
        repo = self._repo(call, repo_id, write=True)
        parent = self._commit(call, repo_id, revision)
        is_pr = _flag(call.query.get('create_pr'))
        ref = f'refs/pr/{1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)}' if is_pr else ''
        if not ref:
            ref = revision if revision in repo.refs else f'refs/heads/{revision}'
            if ref not in repo.refs:
                raise _Refusal(400, f'A commit needs a branch or a pull request, not {revision}')

        operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = next(operation['value'] for operation in operations if operation['key'] == 'header')
        if header.get('parentCommit', parent.sha) != parent.sha:
            raise _Refusal(412, 'A commit has happened since. Please refresh and try again.')
        files, lfs = dict(parent.files), dict(parent.lfs)
        for operation in operations:
            if operation['key'] != 'header':
                _apply(operation['key'], operation['value'], repo, files, lfs)

        commit = repo.add_commit(ref, parent, header['summary'], header.get('description', ''), files, lfs)
        answer = {
            'success': True, 'commitOid': commit.sha, 'commitUrl': f'{self.url}/{repo_id}/commit/{commit.sha}',
            'hookOutput': '',
        }
        if is_pr:
            answer['pullRequestUrl'] = f'{self.url}/{repo_id}/discussions/{ref.removeprefix("refs/pr/")}'
        return _json(answer)

    def resolve(self, call: _Call, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._commit(call, repo_id, revision)
        if path not in commit.files:
            raise _Refusal(404, f'{path} does not exist on "{revision}"', 'EntryNotFound', commit.sha)
        data = commit.files[path]
        headers = {'X-Repo-Commit': commit.sha, 'ETag': f'"{commit.oid(path)}"', 'Accept-Ranges': 'bytes',
                   'Content-Type': 'application/octet-stream'}
        if path in commit.lfs:
            # The Hub redirects to a CDN here. The client takes the metadata from these headers in either case.
            headers |= {'X-Linked-Etag': f'"{commit.lfs[path]}"', 'X-Linked-Size': str(len(data))}
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', call.headers.get('range', ''))
        if not wanted:
            return 200, headers, data
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return 416, headers | {'Content-Range': f'bytes */{len(data)}'}, b''
        return 206, headers | {'Content-Range': f'bytes {start}-{end}/{len(data)}'}, data[start:end + 1]


_ID = r'(?P<repo_id>[^/]+/[^/]+)'
_REV = r'(?P<revision>[^/]+)'
_SLUG = r'(?P<slug>[^/]+/[^/]+)'
_API = f'/api/models/{_ID}'
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = [
    (method, re.compile(pattern), function) for method, pattern, function in (
        ('GET', '/api/agent-harnesses', HubDouble.agent_harnesses),
        ('GET', '/api/whoami-v2', HubDouble.whoami),
        ('POST', '/api/repos/create', HubDouble.create_repo),
        ('POST', '/api/validate-yaml', HubDouble.validate_yaml),
        ('POST', '/api/collections', HubDouble.create_collection),
        ('GET', f'/api/collections/{_SLUG}', HubDouble.collection),
        ('POST', f'/api/collections/{_SLUG}/items', HubDouble.add_collection_item),
        ('GET', _API, HubDouble.info),
        ('GET', f'{_API}/revision/{_REV}', HubDouble.info),
        ('GET', f'{_API}/tree/{_REV}(?P<folder>/.+)?', HubDouble.tree),
        ('POST', f'{_API}/paths-info/{_REV}', HubDouble.paths_info),
        ('GET', f'{_API}/refs', HubDouble.refs),
        ('GET', f'{_API}/commits/{_REV}', HubDouble.commits),
        ('POST', f'{_API}/branch/(?P<branch>[^/]+)', HubDouble.create_branch),
        ('POST', f'{_API}/preupload/{_REV}', HubDouble.preupload),
        ('POST', f'{_API}/commit/{_REV}', HubDouble.create_commit),
        ('POST', f'/{_ID}[.]git/info/lfs/objects/batch', HubDouble.lfs_batch),
        ('POST', f'/{_ID}[.]git/info/lfs/objects/verify', HubDouble.lfs_verify),
        ('PUT', f'/{_ID}[.]git/double/(?P<oid>[0-9a-f]{{64}})', HubDouble.lfs_put),
        ('GET', f'/{_ID}/resolve/{_REV}/(?P<path>.+)', HubDouble.resolve),
    )
]


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that are gone."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, has it handled by the double, writes the reply."""
    double: HubDouble
    protocol_version = 'HTTP/1.1'
    # Head and body of a reply are two writes. Without this, each reply waits for the peer's delayed acknowledgment.
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self._read_body()
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers, len(body))
        try:
            status, reply_headers, content = self.double.handle(request, body)
        except ConnectionError:
            self.close_connection = True
            return
        self.send_response(status)
        defaults = {'X-Request-Id': f'double-{len(self.double.requests)}', 'Content-Length': str(len(content))}
        for name, value in (defaults | reply_headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        # A file whose length the client does not know beforehand. http.server leaves the decoding to us.
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b''.join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent, `HubDouble.requests` has it all."""


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return status, {'Content-Type': 'application/json', **(headers or {})}, json.dumps(content).encode()


def _flag(value: str | None) -> bool:
    return (value or '').lower() in ('1', 'true')


def _is_lfs(path: str, size: int) -> bool:
    name = path.rsplit('/', 1)[-1]
    # The Hub cannot keep an empty file in LFS.
    return size > 0 and (size > REGULAR_LIMIT or any(fnmatch.fnmatchcase(name, pattern) for pattern in LFS_PATTERNS))


def _blob_oid(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n'.encode()


def _lfs_info(commit: Commit, path: str, key: str) -> dict[str, Any]:
    """LFS metadata of a file, the hash under the key that the route in question has for it."""
    size = len(commit.files[path])
    return {key: commit.lfs[path], 'size': size, 'pointerSize': len(_pointer(commit.lfs[path], size))}


def _entries(commit: Commit, prefix: str = '') -> Iterator[dict[str, Any]]:
    """All folders and files below a prefix, as the tree and paths-info routes describe them."""
    folders = set()
    for path in sorted(commit.files):
        if not path.startswith(prefix):
            continue
        parts = path.split('/')
        for depth in range(1, len(parts)):
            folder = '/'.join(parts[:depth])
            if folder not in folders and len(folder) >= len(prefix):
                folders.add(folder)
                # Not what git would compute: nothing here reads a tree by its hash.
                yield {'type': 'directory', 'path': folder, 'oid': _blob_oid(folder.encode()), 'size': 0}
        entry = {'type': 'file', 'path': path, 'oid': commit.oid(path), 'size': len(commit.files[path])}
        if path in commit.lfs:
            entry['lfs'] = _lfs_info(commit, path, 'oid')
        yield entry


def _apply(key: str, value: Mapping[str, Any], repo: Repo, files: dict[str, bytes], lfs: dict[str, str]) -> None:
    """Applies one operation of a commit to the files of its parent."""
    path = value['path']
    if key == 'file':
        try:
            data = base64.b64decode(value['content'], validate=True)
        except binascii.Error as error:
            raise _Refusal(400, f'{path} is not in base64: {error}') from error
        if _is_lfs(path, len(data)):
            raise _Refusal(400, f'{path} has to be uploaded to LFS')
        files[path] = data
        lfs.pop(path, None)
    elif key == 'lfsFile':
        if value['oid'] not in repo.objects:
            raise _Refusal(400, f'LFS pointer of {path} points to an object that has not been uploaded')
        files[path] = repo.objects[value['oid']]
        lfs[path] = value['oid']
    elif key in ('deletedFile', 'deletedFolder'):
        folder = f'{path.strip("/")}/'
        gone = [name for name in files if name == path or (key == 'deletedFolder' and name.startswith(folder))]
        if not gone:
            raise _Refusal(404, f"A file with this name doesn't exist: {path}", 'EntryNotFound')
        for name in gone:
            del files[name]
            lfs.pop(name, None)
    else:
        raise _Refusal(501, f'HubDouble has no commit operation {key}')
