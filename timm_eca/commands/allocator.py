"""How the C library gives memory back, which on a CPU can take longer than the computing."""
import ctypes

__all__ = ['keep_freed_memory']

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed, instead of giving it to the system and having each page zeroed again.

    Which tensors go back depends on what the process did before. Training MobileNetV2 at 32 images of 224 pixels takes
    half the time with it. Returns whether the process has glibc's allocator.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; none to be found on Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1))
