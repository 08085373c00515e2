"""Names of models: with and without ECA, and errors for names that are not registered."""
from timm.models import is_model, list_models

from timm_eca.errors import TimmEcaError, did_you_mean, printable

__all__ = ['UnknownModelError', 'base_name', 'twin_name', 'unknown_model']


class UnknownModelError(TimmEcaError, ValueError):
    """No model has this name."""


def twin_name(model: str) -> str:
    """The registered name of a timm model with ECA."""
    return 'eca_mobilenetv2' if model == 'mobilenetv2_100' else f'eca_{model}'


def base_name(model: str) -> str:
    """The name of the timm model without ECA: the inverse of `twin_name`. Names of timm's own models stay."""
    return 'mobilenetv2_100' if model == 'eca_mobilenetv2' else model.removeprefix('eca_')


def unknown_model(name: str) -> str:
    """One sentence on a `<model>` or `<model>.<tag>` that is not registered, with similar names."""
    model = name.partition('.')[0]
    plain = base_name(model)
    if plain != model and is_model(plain):
        return f'there is no model {model}: timm\'s {plain} has no place for ECA, or has ECA already.'
    return f'there is no model {printable(model)}{did_you_mean(model, list_models())}'
