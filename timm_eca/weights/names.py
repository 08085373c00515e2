"""Errors for names of models that are not registered."""
from timm.models import is_model, list_models

from timm_eca.errors import TimmEcaError, did_you_mean, printable

__all__ = ['UnknownModelError', 'unknown_model']


class UnknownModelError(TimmEcaError, ValueError):
    """No model has this name."""


def unknown_model(name: str) -> str:
    """One sentence on a `<model>` or `<model>.<tag>` that is not registered, with similar names."""
    model = name.partition('.')[0]
    plain = model.removeprefix('eca_')
    if plain != model and is_model(plain):
        return f'there is no model {model}: timm\'s {plain} has no place for ECA, or has ECA already.'
    return f'there is no model {printable(model)}{did_you_mean(model, list_models())}'
