"""Serves model folders as a Hugging Face Hub without network: by olah, a mirror server for the Hub, in offline mode.

Unlike `hub_double` this is a server that others wrote and run, hence a check that does not share our idea of the Hub.
It only reads. Point the client of this process to it by `hub_double.point_client_to`.
"""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ['olah_mirror', 'olah_python']


def olah_python() -> str | None:
    """The interpreter that has olah: `$OLAH_PYTHON`, else this one, if olah is installed in it, else None."""
    return os.environ.get('OLAH_PYTHON') or (sys.executable if importlib.util.find_spec('olah') else None)


@contextmanager
def olah_mirror(
        models: Mapping[str, Path],
        tmp: Path,
        python: str | None = None,
        timeout: float = 60.,
) -> Iterator[str]:
    """Runs olah on a free port as long as the context lasts.

    Args:
        models: The folder of each `org/name`. Its files are committed to `main` of a new git repository, as they are,
            the weights too: olah serves a plain git blob like any file, so that git-lfs is not needed.
        tmp: A folder for these repositories, and for configuration, log and cache of olah.
        python: The interpreter that has olah, `olah_python()` by default.
        timeout: How many seconds the server may take to start.

    Yields:
        The URL of the server, for `HF_ENDPOINT`.

    Raises:
        RuntimeError: The server did not start. The message has its log.
    """
    python = python or olah_python()
    if python is None:
        raise RuntimeError('olah is not installed: pip install olah==0.5.4')
    tmp = tmp.resolve()
    for repo_id, folder in models.items():
        _make_repo(tmp / 'mirrors' / 'models' / repo_id, Path(folder))
    # Offline, the server finds a repository by git alone, so one file of each is all that there is to wait for.
    paths = [f'/{repo_id}/resolve/main/{_first_file(Path(folder))}' for repo_id, folder in models.items()]

    process, url = _start(python, list(models), paths, tmp, timeout)
    try:
        yield url
    finally:
        _stop(process)


def _make_repo(path: Path, folder: Path) -> None:
    path.mkdir(parents=True)
    # The user's git settings must not matter here: they could ignore, convert or sign, or lack a name.
    env = os.environ | {
        'GIT_CONFIG_GLOBAL': os.devnull,
        'GIT_CONFIG_NOSYSTEM': '1',
        'GIT_AUTHOR_NAME': 'olah_mirror',
        'GIT_AUTHOR_EMAIL': 'olah_mirror@localhost',
        'GIT_COMMITTER_NAME': 'olah_mirror',
        'GIT_COMMITTER_EMAIL': 'olah_mirror@localhost',
    }
    for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):  # set where the tests run in a git hook
        env.pop(name, None)
    # The folder is the work tree, so that git reads weights from there, and no copy of them is needed. Weights do not
    # compress anyway, but take git half a minute to try.
    git = ['git', f'--git-dir={path}/.git', f'--work-tree={folder.resolve()}', '-c', 'core.compression=0']
    for args in (['init', '-q', '-b', 'main'], ['add', '--all', '--force', '.'], ['commit', '-q', '-m', 'Add model']):
        result = subprocess.run(git + args, cwd=folder, env=env, text=True, capture_output=True, check=False)
        if result.returncode:
            raise RuntimeError(f'git {args[0]} failed for {folder}: {result.stderr}')


def _first_file(folder: Path) -> str:
    # HEAD of a small one, to not have olah read the weights.
    path = min((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    return path.relative_to(folder).as_posix()


def _start(
        python: str,
        repo_ids: list[str],
        paths: list[str],
        tmp: Path,
        timeout: float,
) -> tuple['subprocess.Popen[bytes]', str]:
    log_path = tmp / 'olah.log'
    deadline = time.monotonic() + timeout
    # The port is free when we look for it, but somebody else may be faster than olah to take it.
    for _ in range(3):
        port = _free_port()
        config = tmp / 'olah.toml'
        config.write_text(_config(repo_ids, port, tmp), encoding='utf-8')
        with open(log_path, 'wb') as log:
            process = subprocess.Popen(
                [python, '-m', 'olah.server', '--config', str(config), '--log-path', str(tmp / 'logs')],
                cwd=tmp,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to stop the git processes with it
            )
        url = f'http://127.0.0.1:{port}'
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if all(_answers(url + path) for path in paths):
                    return process, url
                time.sleep(.1)
        except BaseException:
            _stop(process)
            raise
        _stop(process)
    raise RuntimeError(f'olah did not start:\n{log_path.read_text(errors="replace")[-4000:]}')


def _config(repo_ids: list[str], port: int, tmp: Path) -> str:
    # A JSON string is a TOML string as well.
    lines = [
        '[basic]',
        'host = "127.0.0.1"',
        f'port = {port}',
        f'repos-path = {json.dumps(str(tmp / "repos"))}',
        f'mirrors-path = [{json.dumps(str(tmp / "mirrors"))}]',
        '[accessibility]',
        'offline = true',
    ]
    for repo_id in repo_ids:
        lines += ['[[accessibility.proxy]]', f'repo = {json.dumps(repo_id)}', 'allow = true']
    return '\n'.join(lines) + '\n'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for a local server
    try:
        with opener.open(urllib.request.Request(url, method='HEAD'), timeout=10.):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: 'subprocess.Popen[bytes]') -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5.)
    # Also after a clean exit, for children that outlived it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
