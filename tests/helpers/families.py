"""The registered models with ECA by timm's families, for the README: `PYTHONPATH=tests python -m helpers.families`."""
from timm.models import list_models

import timm_eca  # noqa: F401 (registers)
from timm_eca.models.insert import FAMILIES, twin_name

__all__ = ['families_table', 'twins_by_family']


def twins_by_family() -> dict[str, list[str]]:
    """The names of the models with ECA, by timm's module of the models without."""
    ours = set(list_models(module=['eca_resnet', 'eca_mobilenetv2', 'eca_twins']))
    return {
        family: [twin_name(base) for base in list_models(module=family) if twin_name(base) in ours]
        for family in FAMILIES
    }


def families_table() -> str:
    """A table in Markdown: family, number of models, examples."""
    rows = ['| timm\'s family | models with ECA | for example |', '|---|---|---|']
    families = twins_by_family()
    for family, names in families.items():
        examples = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
        rows.append(f'| `{family}` | {len(names)} | {", ".join(f"`{name}`" for name in examples)} |')
    rows.append(f'| together | {sum(map(len, families.values()))} | |')
    return '\n'.join(rows)


if __name__ == '__main__':
    print(families_table())
