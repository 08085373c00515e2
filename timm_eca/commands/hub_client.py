"""How long the Hub's client may wait. Downloads have time-outs of their own."""
import re
from typing import Any

from huggingface_hub import set_client_factory

# Private: the client that huggingface_hub would make has its hooks, and there is no public way to it.
from huggingface_hub.utils._http import default_client_factory

from timm_eca.errors import printable

__all__ = ['limit_waiting']

SILENCE = 60.  # seconds without a byte
_SECONDS = '([0-9]{1,2}|[1-2][0-9]{2}|300)'  # that a server may ask to wait for
_PATIENCE, _LIMITS = re.compile(_SECONDS), re.compile(rf'"[a-z]+";r=[0-9]+;t={_SECONDS}')


def limit_waiting() -> None:
    """Has this process's client of the Hub give up on silent servers, those that ask to wait for long, and bombs.

    By itself it waits for ever for the answers to all but downloads, and as long as any `Retry-After` says. What it
    tries again, and how often, is left to it. For commands: a program of others may have a client of its own.
    """
    def make() -> Any:
        client: Any = default_client_factory()
        client.timeout = SILENCE
        client.headers['Accept-Encoding'] = 'identity'
        client.event_hooks = {
            **client.event_hooks, 'response': [*client.event_hooks.get('response', ()), _shorten, _refuse_compressed]}
        return client
    set_client_factory(make)


def _shorten(response: Any) -> None:
    """Takes from an answer what asks to wait for longer: the client then waits as it does where nothing is asked."""
    if not _PATIENCE.fullmatch(response.headers.get('retry-after', '0')):
        del response.headers['retry-after']
    if not _LIMITS.fullmatch(response.headers.get('ratelimit', '"none";r=0;t=0')):
        del response.headers['ratelimit']


def _refuse_compressed(response: Any) -> None:
    """A small answer is not to become a large one; nobody was asked to compress any."""
    encoding = response.headers.get('content-encoding', 'identity')
    if encoding != 'identity':
        raise OSError(f'the server compresses its answers ({printable(encoding)}), unasked')
