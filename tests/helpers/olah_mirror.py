"""Serves model folders with olah, a mirror of the Hugging Face Hub that runs without a network.

Other people wrote this server, so it checks what `hub_double` can't: our idea of the Hub. It takes no uploads.
"""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ['olah_mirror', 'olah_python']


def olah_python() -> str | None:
    """The interpreter that has olah: `$OLAH_PYTHON`, else this one if it has olah, else None."""
    return os.environ.get('OLAH_PYTHON') or (sys.executable if importlib.util.find_spec('olah') else None)


@contextmanager
def olah_mirror(models: Mapping[str, Path], tmp: Path) -> Iterator[str]:
    """Runs olah on a free port, with the folder of each `org/name` as a git repository, and gives its URL."""
    for repo_id, folder in models.items():
        _make_repo(tmp / 'mirrors' / 'models' / repo_id, folder)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    lines = [
        '[basic]', 'host = "127.0.0.1"', f'port = {port}',
        f'repos-path = {json.dumps(str(tmp / "repos"))}',  # a JSON string is a TOML string, too
        f'mirrors-path = [{json.dumps(str(tmp / "mirrors"))}]', '[accessibility]', 'offline = true',
    ]
    for repo_id in models:
        lines += ['[[accessibility.proxy]]', f'repo = {json.dumps(repo_id)}', 'allow = true']
    (tmp / 'olah.toml').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    with open(tmp / 'olah.log', 'wb') as log:
        process = subprocess.Popen(
            [str(olah_python()), '-m', 'olah.server', '--config', 'olah.toml', '--log-path', str(tmp / 'logs')],
            cwd=tmp, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True)  # a process group, to stop its git processes, too
    try:
        url, deadline = f'http://127.0.0.1:{port}', time.monotonic() + 60
        while not all(_answers(f'{url}/{repo_id}/resolve/main/config.json') for repo_id in models):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((tmp / 'olah.log').read_text())
            time.sleep(.1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _make_repo(path: Path, folder: Path) -> None:
    path.mkdir(parents=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith('GIT_')}  # set inside git hooks
    env |= {'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_NOSYSTEM': '1'}
    # git reads the files from the folder, without a copy. It would take half a minute to compress weights.
    git = ['git', f'--git-dir={path}/.git', f'--work-tree={folder}', '-c', 'core.compression=0',
           '-c', 'user.name=olah_mirror', '-c', 'user.email=olah_mirror@localhost']
    for args in (['init', '-q', '-b', 'main'], ['add', '--all', '--force', '.'], ['commit', '-q', '-m', 'Add model']):
        subprocess.run(git + args, cwd=folder, env=env, check=True)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for a local server
    try:
        with opener.open(urllib.request.Request(url, method='HEAD'), timeout=10.):
            return True
    except OSError:
        return False
