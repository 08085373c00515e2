"""Settings that a command makes in its own process. The library makes none: other programs have their own."""
import ctypes
import os
from typing import Any

from timm_eca.errors import TimmEcaError

__all__ = ['SILENCE', 'keep_freed_memory', 'limit_waiting']

SILENCE = 60.  # seconds
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def limit_waiting() -> None:
    """Makes the Hub's client raise an error after a minute without a byte. Its own default is to wait forever.

    The client is made when a command first needs the network.
    """
    from huggingface_hub import set_client_factory
    set_client_factory(_make_client)


def _make_client() -> Any:
    # Private, but get_session() can't be called here: it holds a lock while it calls this function.
    from huggingface_hub.utils._http import default_client_factory
    try:
        client = default_client_factory()
    except (ImportError, ValueError) as e:  # a SOCKS proxy without the package socksio; an unknown scheme
        socks = isinstance(e, ImportError)
        raise TimmEcaError(
            f'{_set_variables("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")} names a proxy that can\'t be used',
            'pip install socksio' if socks else 'write http://HOST:PORT or socks5://HOST:PORT') from e
    except OSError as e:
        raise TimmEcaError(
            f'{_set_variables("SSL_CERT_FILE", "SSL_CERT_DIR")} names certificates that can\'t be read',
            'name a PEM file that exists, or unset the variable') from e
    client.timeout = SILENCE
    return client


def _set_variables(*names: str) -> str:
    """Those of the environment variables that are set, without their values: a proxy's may hold a password."""
    found = [name for name, value in os.environ.items() if name.upper() in names and not value.startswith('http')]
    return ' or '.join(sorted(found))


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory. Otherwise it returns pages to the system, which fills each with zeros again.

    This halves the time of training MobileNetV2 on a CPU (32 images of 224 pixels). Returns whether the process has
    glibc's allocator.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1))
