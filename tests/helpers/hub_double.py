"""A Hugging Face Hub for tests: an HTTP server in this process that keeps model repositories in memory.

The real client, huggingface_hub, talks to it. It answers what our code asks for: uploads in one commit (branches and
pull requests, too), collections, and downloads. It has no Xet, so `point_client_to` switches that off in the client.
"""
import base64
import hashlib
import json
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from helpers.local_server import Reply, Request, serve
from huggingface_hub import constants

__all__ = ['Commit', 'HubDouble', 'Repo', 'Reply', 'Request', 'point_client_to']

DATE = '2026-01-01T00:00:00.000Z'
PUSHED = 'Upload weights with timm_eca'  # the title of our commits


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
    """One commit, with the content of all files."""
    sha: str
    message: str
    parent: 'Commit | None'
    files: dict[str, bytes]

    def log(self) -> list['Commit']:
        """This commit and those before it, newest first."""
        return [self, *(self.parent.log() if self.parent else [])]

    def last_change(self, path: str) -> 'Commit':
        """The last commit that changed a file."""
        return list(takewhile(lambda commit: commit.files.get(path) == self.files[path], self.log()))[-1]

    def digest(self, path: str) -> str:
        """The digest by which the client compares a file: the SHA-256 in LFS, else that of git."""
        data = self.files[path]
        return _sha256(data) if _is_lfs(path) else hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: the last commit of each ref, e.g. `main` and `refs/pr/1`."""
    id: str
    private: bool
    refs: dict[str, Commit]

    def head(self, revision: str = 'main') -> Commit:
        return self.refs[revision]

    def log(self) -> list[Commit]:
        """The commits of the main branch, newest first."""
        return self.head().log()

    def commit(self, message: str, files: Mapping[str, bytes], revision: str = 'main', ref: str = '') -> Commit:
        """Adds a commit to a revision, or makes another ref of it."""
        parent = self.refs.get(revision)
        sha = hashlib.sha1(f'{self.id} {parent and parent.sha} {message} {list(files)}'.encode()).hexdigest()
        commit = Commit(sha, message, parent, {**(parent.files if parent else {}), **files})
        self.refs[ref or revision] = commit
        return commit


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
        self.url = ''
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # in LFS, by SHA-256
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.ignores_private = False
        self.fault: Callable[[str, str], Reply | None] | None = None
        self._lock = threading.RLock()
        self._stack = ExitStack()

    def __enter__(self) -> 'HubDouble':
        self.url = self._stack.enter_context(serve(self._answer))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """Makes a repository with the Hub's own first commit, and with files that look as if we had pushed them."""
        repo = self.repos[repo_id] = Repo(repo_id, private, {})
        repo.commit('initial commit', {'.gitattributes': b''})
        if files:
            repo.commit(PUSHED, files)
        return repo

    def called(self, method: str, part: str = '') -> list[Request]:
        """The requests of a method whose path contains `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]

    def _answer(self, request: Request) -> Reply:
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
                return function(self, request, *map(unquote, match.groups()))
        raise _Refusal(501, f'HubDouble has no {request.method} {request.path}')

    def _commit(self, request: Request, repo_id: str, revision: str) -> Commit:
        repo, known = self.repos.get(repo_id), 'authorization' in request.headers
        if repo is None or (repo.private and not known):
            raise _Refusal(404 if known else 401, 'Repository not found', 'RepoNotFound')
        if revision not in repo.refs:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo.refs[revision]

    def agent_harnesses(self, request: Request) -> Reply:
        return _json({'standardEnvVars': [], 'harnesses': {}})  # the client asks once, for its User-Agent

    def create_repo(self, request: Request) -> Reply:
        wish = json.loads(request.body)
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
            ModelCard(json.loads(request.body)['content'])
        except Exception as error:  # of the YAML parser, or of the card's data
            return _json({'errors': [{'message': str(error)}], 'warnings': []}, 400)
        return _json({'errors': [], 'warnings': []})

    def info(self, request: Request, repo_id: str, revision: str = 'main') -> Reply:
        commit = self._commit(request, repo_id, revision)
        return _json({'id': repo_id, 'sha': commit.sha, 'private': self.repos[repo_id].private, 'siblings': []})

    def paths_info(self, request: Request, repo_id: str, revision: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        found = []
        for path in parse_qs(request.body.decode())['paths']:
            if path in commit.files:
                change = commit.last_change(path)
                found.append({
                    'type': 'file', 'path': path, 'oid': commit.digest(path), 'size': len(commit.files[path]),
                    'lastCommit': {'id': change.sha, 'title': change.message, 'date': DATE}})
        return _json(found)

    def create_branch(self, request: Request, repo_id: str, branch: str) -> Reply:
        if branch in self.repos[repo_id].refs:
            raise _Refusal(409, f'Reference already exists: {branch}')
        self.repos[repo_id].refs[branch] = self._commit(request, repo_id, 'main')
        return _json({})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        return _json({'files': [{
            'path': path, 'uploadMode': 'lfs' if _is_lfs(path) else 'regular', 'shouldIgnore': False,
            # the client leaves a file with this digest out of the commit
            'oid': commit.digest(path) if path in commit.files else None,
        } for path in (file['path'] for file in json.loads(request.body)['files'])]})

    def lfs_batch(self, request: Request, repo_id: str) -> Reply:
        return _json({'transfer': 'basic', 'objects': [{
            **wanted, **({} if wanted['oid'] in self.objects else {
                'actions': {'upload': {'href': f'{self.url}/{repo_id}.git/double/{wanted["oid"]}'}}}),
        } for wanted in json.loads(request.body)['objects']]})

    def lfs_put(self, request: Request, repo_id: str, oid: str) -> Reply:
        if _sha256(request.body) != oid:
            raise _Refusal(400, f'The content of {len(request.body)} bytes has another SHA-256 than {oid}')
        self.objects[oid] = request.body  # no token here, as with the signed links of the Hub
        return 200, {}, b''

    def create_commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        self._commit(request, repo_id, revision)
        repo = self.repos[repo_id]
        header, *operations = [json.loads(line)['value'] for line in request.body.splitlines() if line.strip()]
        files = {value['path']: self.objects[value['oid']] if 'oid' in value else base64.b64decode(value['content'])
                 for value in operations}
        ref, address = '', {}
        if request.query.get('create_pr') in ('1', 'true'):
            ref, address = 'refs/pr/1', {'pullRequestUrl': f'{self.url}/{repo_id}/discussions/1'}
        commit = repo.commit(header['summary'], files, revision, ref)
        return _json({'commitOid': commit.sha, 'commitUrl': f'{self.url}/{repo_id}/commit/{commit.sha}', **address})

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._commit(request, repo_id, revision)
        if path not in commit.files:
            raise _Refusal(404, f'{path} does not exist on "{revision}"', 'EntryNotFound')
        return 200, {'X-Repo-Commit': commit.sha, 'ETag': f'"{commit.digest(path)}"'}, commit.files[path]

    def create_collection(self, request: Request) -> Reply:
        wish = json.loads(request.body)
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
        wish, items = json.loads(request.body)['item'], self.collections[slug]['items']
        self._commit(request, wish['id'], 'main')
        if wish['id'] in [item['id'] for item in items]:
            raise _Refusal(409, 'This item is in the collection already')
        items.append({'_id': f'{len(items):024x}', 'id': wish['id'], 'type': wish['type'], 'position': len(items)})
        return _json(self.collections[slug])


_REPO = '([^/]+/[^/]+)'
_ROUTES: dict[str, Callable[..., Reply]] = {
    'GET /api/agent-harnesses': HubDouble.agent_harnesses,
    'POST /api/repos/create': HubDouble.create_repo,
    'POST /api/validate-yaml': HubDouble.validate_yaml,
    'POST /api/collections': HubDouble.create_collection,
    f'GET /api/collections/{_REPO}': HubDouble.collection,
    f'POST /api/collections/{_REPO}/items': HubDouble.add_collection_item,
    f'GET /api/models/{_REPO}': HubDouble.info,
    f'GET /api/models/{_REPO}/revision/([^/]+)': HubDouble.info,
    f'POST /api/models/{_REPO}/paths-info/([^/]+)': HubDouble.paths_info,
    f'POST /api/models/{_REPO}/branch/([^/]+)': HubDouble.create_branch,
    f'POST /api/models/{_REPO}/preupload/([^/]+)': HubDouble.preupload,
    f'POST /api/models/{_REPO}/commit/([^/]+)': HubDouble.create_commit,
    f'POST /{_REPO}[.]git/info/lfs/objects/batch': HubDouble.lfs_batch,
    f'PUT /{_REPO}[.]git/double/([0-9a-f]+)': HubDouble.lfs_put,
    f'GET /{_REPO}/resolve/([^/]+)/(.+)': HubDouble.resolve,
}


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return status, {'Content-Type': 'application/json', **(headers or {})}, json.dumps(content).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith(('.safetensors', '.bin'))
