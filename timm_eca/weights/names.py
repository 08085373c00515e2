"""What to say about the name of a model that is not registered."""
from timm.models import get_arch_pretrained_cfgs, is_model, list_models

from timm_eca.errors import TimmEcaError, did_you_mean, printable

__all__ = ['UnknownModelError', 'unknown_model']


class UnknownModelError(TimmEcaError, ValueError):
    """A name that no model has."""


def unknown_model(name: str) -> str:
    """Describes in one sentence what is wrong with the name of a model or of its weights, with names that are close.

    Args:
        name: A `<model>` or `<model>.<tag>` that timm cannot create.
    """
    model, _, tag = name.partition('.')
    plain = model.removeprefix('eca_')
    if tag and is_model(model):
        tags = [str(cfg.tag) for cfg in get_arch_pretrained_cfgs(model).values()]
        return f'there are no weights {printable(tag)} of {model}{did_you_mean(tag, tags)}'
    if plain != model and is_model(plain):
        return f'there is no model {model}: timm\'s {plain} has no place for ECA, or has ECA already.'
    return f'there is no model {printable(model)}{did_you_mean(model, list_models())}'
