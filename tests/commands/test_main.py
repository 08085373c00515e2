"""The command line by itself: its help, its errors, and what it imports."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_eca
from timm_eca.commands.main import COMMANDS, main
from timm_eca.errors import TimmEcaError, did_you_mean, first_line, printable
from timm_eca.weights.names import unknown_model

HEAVY = ('accelerate', 'matplotlib', 'transformers', 'sklearn', 'scipy', 'pandas', 'datasets', 'onnx', 'gdown')
# What `import timm` has imported already does not count.
SCRIPT = f'''
import argparse, json, sys
import timm
before = set(sys.modules)
from timm_eca.commands.main import main
imported = {{}}
for arguments in {[[], *([name] for name in COMMANDS)]}:
    try:
        main([*arguments, '--help'])
    except SystemExit as e:
        assert e.code == 0
    imported[' '.join(arguments)] = sorted(set(sys.modules) - before)
print(json.dumps(imported))
'''


@pytest.mark.slow
def test_help_imports_no_more_than_it_needs():
    done = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=True)
    *help, last = done.stdout.splitlines()
    imported: dict[str, list[str]] = json.loads(last)
    assert help
    of_commands = {name for name in imported[''] if name.startswith('timm_eca.commands.')}
    assert of_commands == {'timm_eca.commands.main', 'timm_eca.commands.process'}
    others = {name.partition('.')[0] for name in imported[''] if not name.startswith('torch._C.')}
    assert others - sys.stdlib_module_names == {'timm_eca'}
    assert 'timm_eca.conversion.convert' not in imported['']
    for name in COMMANDS:
        assert f'timm_eca.commands.{name}' in imported[name]
        assert not {module.partition('.')[0] for module in imported[name]} & {*HEAVY}, name


def test_convert_is_imported_when_it_is_used():
    from timm_eca.conversion.convert import convert
    assert timm_eca.convert is convert
    assert set(timm_eca.__all__) <= set(dir(timm_eca))
    with pytest.raises(AttributeError, match='no_such_name'):
        timm_eca.no_such_name  # noqa: B018


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'problem', 'place'), [
    ('', 'the following arguments are required: COMMAND', 'timm-eca'),
    ('lst', 'there is no command lst: did you mean list?', 'timm-eca'),
    ('--verion', 'the following arguments are required: COMMAND', 'timm-eca'),
    ('predict photo.jpg', 'the following arguments are required: --model', 'timm-eca predict'),
    ('predict photo.jpg --model x --topk none', "argument --topk: invalid positive value: 'none'", 'timm-eca predict'),
    ('predict photo.jpg --model x --tokp 3', 'unknown argument --tokp: did you mean --topk?', 'timm-eca predict'),
    # No abbreviations, neither of the options of a command nor of those that many have.
    ('predict photo.jpg --mod x', 'the following arguments are required: --model', 'timm-eca predict'),
    ('push folder a/b --dry', 'unknown argument --dry: did you mean --dry-run?', 'timm-eca push'),
    ('finetune data --model eca_resnet18 --epoch=3', 'unknown argument --epoch: did you mean --epochs?',
     'timm-eca finetune'),
    ('list a b', 'unknown argument b.', 'timm-eca list'),
])
def test_errors_of_the_parser_have_two_lines(
        arguments: str, problem: str, place: str, capsys: pytest.CaptureFixture[str]):
    assert _error(capsys, *arguments.split()) == f'{place}: {problem}\nSee {place} --help.\n'


def test_help_has_the_commands_in_order_and_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(['--help'])
    lines = capsys.readouterr().out.splitlines()
    first_words = [line.split()[0] for line in lines if line.strip()]
    positions = [first_words.index(name) for name in COMMANDS]
    assert positions == sorted(positions)
    assert all(len(line) <= 80 for line in lines)
    examples = [line.split()[1] for line in lines if line.startswith('  timm-eca ')]
    assert len(examples) >= 2
    assert set(examples) <= set(COMMANDS)


def test_unknown_models():
    assert unknown_model('eca_resnet5O').startswith('there is no model eca_resnet5O: did you mean eca_resnet50')
    assert 'regnety_004' in unknown_model('regnety_04')
    assert 'timm\'s vgg16 has no place for ECA' in unknown_model('eca_vgg16')
    assert unknown_model('qqq\n' * 100).startswith('there is no model qqq\\nqqq')
    assert unknown_model('') == 'there is no model .'


def test_did_you_mean():
    assert did_you_mean('lst', ['list', 'push']) == ': did you mean list?'
    assert did_you_mean('x', []) == '.'


def test_texts_are_cut_between_words():
    words = ' '.join(['word'] * 100)
    assert printable(words, 80) == f'{words[:79]} ...'
    assert printable(words[:79], 79) == words[:79]
    assert printable(words, 4) == 'word ...'
    assert printable('x' * 100, 80) == f'{"x" * 80} ...'
    assert printable('a ' + 'x' * 100, 80) == f'a {"x" * 78} ...'
    assert printable('a\x1b[2J\nb') == r'a\x1b[2J\nb'
    assert first_line(ValueError(f'{words}\nmore'), 80) == f'{words[:79]} ...'
    assert first_line(ValueError()) == 'ValueError'


def test_cures_have_lines_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    error = TimmEcaError('It is broken:', 'mend it', 'or buy another')
    assert str(error) == 'It is broken:\n  mend it\n  or buy another'
    assert first_line(error) == 'It is broken:'
    assert main(['list', 'eca_resnet5O']) == 2
    problem, *cures = capsys.readouterr().err.splitlines()
    assert problem.startswith('timm-eca: there is no model eca_resnet5O: did you mean eca_resnet50')
    assert cures == ['  timm-eca list "eca_*" shows all models']


def test_the_citation_is_of_this_version():
    citation = (Path(__file__).parents[2] / 'CITATION.cff').read_text()
    assert f'\nversion: {timm_eca.__version__}\n' in citation
