"""The plan of the package: a room imports only from rooms before it. See .github/CONTRIBUTING.md."""
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_eca'
ROOMS = ('layers', 'images', 'weights', 'conversion', 'models', 'analysis', 'finetune', 'commands')  # in order
SHARED = ('errors', 'version')  # modules that every room may import


def _imports(path: Path, package: str = '') -> Iterator[tuple[int, str]]:
    """The line and the full name of all that a file imports, within functions and under `TYPE_CHECKING`, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')
            start = '.'.join(parents[:len(parents) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, (start, node.module)))
            yield from ((node.lineno, f'{module}.{alias.name}') for alias in node.names)


def _imports_of_the_package() -> Iterator[tuple[str, str, str]]:
    """The room, the place and the name of each import in the package."""
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        package = '.'.join(('timm_eca', *parts[:-1]))
        for line, name in _imports(path, package):
            yield parts[0], f'{path.relative_to(ROOT)}:{line} imports {name}', name


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in PACKAGE.glob('*/*.py')}
    assert folders == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob('*.py')} == {*SHARED, '__init__', '__main__'}


def test_rooms_import_only_from_those_before():
    wrong = []
    for room, place, name in _imports_of_the_package():
        if not name.startswith('timm_eca') or room in ('__init__', '__main__'):
            continue
        allowed = ROOMS[:ROOMS.index(room) + 1] if room in ROOMS else ()
        if name.split('.')[1:2] == [] or name.split('.')[1] not in (*allowed, *SHARED):
            wrong.append(place)
    assert not wrong, '\n'.join(wrong)


def test_layers_import_only_torch_and_the_layers_of_timm():
    wrong = [
        place for room, place, name in _imports_of_the_package()
        if room == 'layers' and not name.startswith(('torch.', 'triton.', 'timm.layers.', 'timm_eca.'))
        and name not in ('torch', 'triton') and name.partition('.')[0] not in sys.stdlib_module_names
    ]
    assert not wrong, '\n'.join(wrong)


def test_names_say_what_is_inside():
    assert not [path for path in PACKAGE.rglob('*') if path.stem.strip('_') in ('util', 'utils', 'misc', 'common')]


def test_no_test_imports_another():
    tests = sorted((ROOT / 'tests').rglob('*.py'))
    names = {path.stem for path in tests if path.stem.startswith('test_')}
    wrong = [
        f'{path.relative_to(ROOT)}:{line} imports {name}' for path in tests for line, name in _imports(path)
        if names & {*name.split('.')} or name.partition('.')[0] == 'conftest'
    ]
    assert not wrong, '\n'.join(wrong)


def test_the_checks_find_what_they_look_for(tmp_path: Path):
    source = 'import a.b\ndef f():\n    from . import c\n    from ..d import e as g\n    from timm_eca import convert\n'
    (tmp_path / 'file.py').write_text(source)
    found = {name for _, name in _imports(tmp_path / 'file.py', 'timm_eca.layers')}
    assert found == {'a.b', 'timm_eca.layers.c', 'timm_eca.d.e', 'timm_eca.convert'}


def test_the_page_for_contributors_names_what_is_there():
    page = (ROOT / '.github' / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert tuple(re.findall(r'^\| `(\w+)/` \|', page, re.MULTILINE)) == ROOMS
    named = set(re.findall(rf'`((?:{"|".join(ROOMS)})/\w+\.py)`', page))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (PACKAGE / name).is_file()] == []
