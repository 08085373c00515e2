"""The rules for every error and for the memory, for both fuzzers."""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['check_sentence', 'limited_memory']

CONSTANT = 128 * 2 ** 20  # bytes of torch's and the allocator's own, beside twice the file's


def check_sentence(error: Exception, name: str) -> str:
    """Checks that an error is one sentence that names the file, and returns the beginning of the sentence."""
    sentence = str(error)
    assert sentence.isprintable(), sentence
    assert name in sentence, sentence
    assert len(sentence) < 2000, sentence
    words = re.sub(r"(^: )?'.*?'", '', sentence.split(name, 1)[1]).strip(':/ ')
    return ' '.join(words.split()[:6])


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Asserts, on Linux, that the block takes no more memory than twice the size of a file and a constant."""
    watch = Path('/proc/self/clear_refs')
    if not watch.exists():
        yield
        return
    watch.write_text('5')  # the peak is counted from here on
    before = _memory('VmRSS')
    yield
    taken = _memory('VmHWM') - before
    assert taken < 2 * size + CONSTANT, f'{taken / 2 ** 20:.0f} MiB for a file of {size / 2 ** 20:.0f}'


def _memory(kind: str) -> int:
    """Bytes of this process."""
    found = re.search(rf'{kind}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found
    return int(found[1]) * 1024
