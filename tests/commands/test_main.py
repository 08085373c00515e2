"""The command line (help, errors, imports), and the import of the package."""
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from helpers.hub_double import HubDouble

import timm_eca
from timm_eca.commands.main import COMMANDS, main
from timm_eca.errors import TimmEcaError, first_line, printable
from timm_eca.models import registration
from timm_eca.weights.names import unknown_model

ROOT = Path(__file__).parents[2]


def test_help_imports_nothing_but_this_package(tmp_path: Path):
    """timm and torch take seconds. The console script is recognized by its name, `-m` by the command line."""
    script = tmp_path / 'timm-eca'
    script.write_text("""
import contextlib, sys
sys.path.insert(0, sys.argv.pop(1))
for name in ('torch', 'timm', 'huggingface_hub', 'numpy', 'PIL', 'safetensors'):
    sys.modules[name] = None  # an import of it fails
from timm_eca.commands.main import COMMANDS, main
for arguments in ([], ['--version'], *([name, '--help'] for name in COMMANDS)):
    with contextlib.suppress(SystemExit):
        main(arguments)
""")
    subprocess.run([sys.executable, str(script), str(ROOT)], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'timm_eca', '--help'], capture_output=True, text=True, check=True,
        cwd=ROOT)
    assert 'timm_eca' in done.stderr
    assert ' torch\n' not in done.stderr


@pytest.mark.parametrize(('argv', 'registers'), [
    (None, True), ([], True), (['timm-eca.py'], True), (['-m', '--x'], True), (['/usr/bin/timm-eca', 'list'], False),
    ([os.path.join('x', 'timm-eca.exe')], False),
])
def test_only_a_command_registers_later(argv: list[str] | None, registers: bool, monkeypatch: pytest.MonkeyPatch):
    if argv is None:  # as in a Python inside another program
        monkeypatch.delattr(sys, 'argv')
    else:
        monkeypatch.setattr(sys, 'argv', argv)
    assert timm_eca._runs_as_command() != registers


def test_public_names():
    from timm_eca.conversion.convert import convert
    assert timm_eca.convert is convert
    assert set(timm_eca.__all__) <= set(dir(timm_eca))
    assert all(callable(getattr(timm_eca, name)) for name in timm_eca.__all__ if name != '__version__')
    with pytest.raises(AttributeError, match='no_such_name'):
        timm_eca.no_such_name  # noqa: B018


def test_older_timm_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timm, '__version__', '0.9.16')
    with pytest.raises(ImportError, match=r'timm_eca .* needs timm [\d.]+ or newer, but .*timm.* is 0\.9\.16'):
        importlib.reload(registration)


def test_versions():
    assert importlib.metadata.version('timm_eca') == timm_eca.__version__
    assert f'\nversion: {timm_eca.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def _exit(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, list[str]]:
    """The exit status of a command line that isn't run, and the lines that it prints."""
    with pytest.raises(SystemExit) as e:
        main(arguments)
    printed = capsys.readouterr()
    return e.value.code, (printed.out or printed.err).splitlines()


@pytest.mark.parametrize(('arguments', 'place', 'words'), [
    ('lst', 'timm-eca', "invalid choice: 'lst'"),
    ('predict photo.jpg', 'timm-eca predict', '--model'),
    ('predict photo.jpg --model x --topk none', 'timm-eca predict', '--topk'),
    ('predict photo.jpg --model x --tokp 3', 'timm-eca predict', 'unknown arguments: --tokp 3'),
    ('predict x --model x --results-file x.txt', 'timm-eca predict', 'name a .csv or a .json file'),
    # Options can't be abbreviated.
    ('predict photo.jpg --mod x', 'timm-eca predict', '--model'),
    ('push folder a/b --dry', 'timm-eca push', 'unknown arguments: --dry'),
    ('run', 'timm-eca run', 'SCRIPT'), ('run -m', 'timm-eca run', 'name a module after -m'),
    ('run absent.py', 'timm-eca run', 'absent.py does not exist'),
    ('run -m absent.module', 'timm-eca run', 'no module absent.module'),
])
def test_errors_of_the_parser_have_two_lines(
        arguments: str, place: str, words: str, capsys: pytest.CaptureFixture[str]):
    status, (problem, fix) = _exit(capsys, *arguments.split())
    assert status == 2
    assert problem.startswith(f'{place}: ')
    assert words in problem
    assert fix == f'See {place} --help.'


def test_help_has_the_commands_in_order_and_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    status, lines = _exit(capsys)
    assert status in (0, None)
    first_words = [line.split()[0] for line in lines if line.strip()]
    positions = [first_words.index(name) for name in COMMANDS]
    assert positions == sorted(positions)
    examples = [line.split()[1] for line in lines if line.startswith('  timm-eca ')]
    assert len(examples) >= 2
    assert set(examples) <= set(COMMANDS)


@pytest.mark.parametrize(('variable', 'value', 'fix'), [
    ('ALL_PROXY', 'socks5://user:secret@127.0.0.1:1', 'pip install socksio'),
    ('ALL_PROXY', 'socks://127.0.0.1:1', 'socks5://HOST:PORT'),
    ('https_proxy', 'ftp://127.0.0.1:1', 'http://HOST:PORT'),
    ('SSL_CERT_FILE', '/absent.pem', 'PEM file'),
])
def test_settings_of_the_network_that_cannot_be_used(
        variable: str, value: str, fix: str, hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]):
    """They end only commands that need the network."""
    if 'socksio' in fix:
        monkeypatch.setitem(sys.modules, 'socksio', None)
    monkeypatch.setenv(variable, value)
    assert main(['list', 'eca_resnet18']) == 0
    capsys.readouterr()
    assert main(['verify', 'hf-hub:timm-eca/model']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert f'{variable} names' in error
    assert fix in error
    assert 'secret' not in error
    assert not hub.requests


def test_unknown_models():
    assert unknown_model('eca_resnet5O').startswith('there is no model eca_resnet5O: did you mean eca_resnet50')
    assert 'regnety_004' in unknown_model('regnety_04')
    assert 'timm\'s vgg16 has no place for ECA' in unknown_model('eca_vgg16')
    assert unknown_model('qqq\n' * 100).startswith('there is no model qqq\\nqqq')
    assert unknown_model('') == 'there is no model .'


def test_texts_from_outside():
    assert printable('a\x1b[2J\nb') == r'a\x1b[2J\nb'
    assert printable('x' * 100, 80) == f'{"x" * 80} ...'
    assert first_line(ValueError('one\ntwo')) == 'one'
    assert first_line(ValueError()) == 'ValueError'


def test_errors_have_a_problem_and_fixes():
    one, two = TimmEcaError('It is broken', 'mend it'), TimmEcaError('It is broken', 'mend it', 'buy another')
    assert str(one) == 'It is broken: mend it.'
    assert str(two) == 'It is broken\n  - mend it\n  - buy another'
    assert (two.problem, two.fixes) == ('It is broken', ('mend it', 'buy another'))
