"""What to say about the name of a model that is not registered."""
from timm.models import is_model, list_models

from timm_eca.errors import TimmEcaError, did_you_mean, printable

__all__ = ['UnknownModelError', 'unknown_model']


class UnknownModelError(TimmEcaError, ValueError):
    """A name that no model has."""


def unknown_model(name: str) -> str:
    """Describes in one sentence what is wrong with the name of a model, with names that are close.

    Args:
        name: A `<model>` or `<model>.<tag>` that timm cannot create.
    """
    model = name.partition('.')[0]
    plain = model.removeprefix('eca_')
    if plain != model and is_model(plain):
        return f'there is no model {model}: timm\'s {plain} has no place for ECA, or has ECA already.'
    return f'there is no model {printable(model)}{did_you_mean(model, list_models())}'
