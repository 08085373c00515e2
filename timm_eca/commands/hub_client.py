"""The time-out of the Hub's client."""
from huggingface_hub import get_session, set_client_factory

__all__ = ['SILENCE', 'limit_waiting']

SILENCE = 60.  # seconds


def limit_waiting() -> None:
    """Makes this process's client of the Hub raise an error after a minute without a byte.

    By itself it waits forever for answers, those to downloads excepted. For commands only: another program may have
    set up a client of its own.
    """
    client = get_session()
    set_client_factory(
        lambda: type(client)(event_hooks=client.event_hooks, follow_redirects=client.follow_redirects, timeout=SILENCE))
