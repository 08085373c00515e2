"""What both fuzzers share: changes of bytes, and what must hold of every error and of the memory."""
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies

__all__ = ['Damage', 'check_sentence', 'damage', 'damages', 'limited_memory']

Damage = tuple[str, int, int]
KINDS = ['flip', 'cut', 'insert', 'zero', 'repeat', 'number']
CONSTANT = 128 * 2 ** 20  # bytes beside twice the file's, of torch's and the allocator's own


def damages(most: int = 2) -> strategies.SearchStrategy[list[Damage]]:
    """Changes of bytes."""
    number = strategies.integers(0, 2 ** 32 - 1)
    return strategies.lists(strategies.tuples(strategies.sampled_from(KINDS), number, number), max_size=most)


def damage(content: bytes, changes: Sequence[Damage]) -> bytes:
    """A content after changes of its bytes: half of them in the first kilobytes, where the structure is."""
    data = bytearray(content)
    for kind, first, second in changes:
        position = first % (len(data) if second % 2 else min(len(data), 4096)) if data else 0
        if kind == 'flip' and data:
            data[position] ^= 1 << second % 8
        elif kind == 'cut':
            del data[position:]
        elif kind == 'insert':
            data[position:position] = bytes([second % 256]) * (1 + second % 5000)
        elif kind == 'zero':
            data[position:position + second % 300] = bytes(len(data[position:position + second % 300]))
        elif kind == 'repeat':
            data[position:position] = data[second % (len(data) or 1):][:2000]
        elif kind == 'number':
            data[position:position + 8] = (2 ** 63 - 1 - second % 3).to_bytes(8, 'little')
    return bytes(data)


def check_sentence(error: Exception, name: str) -> str:
    """Checks that an error is one sentence that names the file, and returns what kind of a sentence it is."""
    sentence = str(error)
    assert sentence.isprintable(), sentence
    assert name in sentence, sentence
    assert len(sentence) < 2000, sentence
    words = re.sub(r"(^: )?'.*?'", '', sentence.split(name, 1)[1]).strip(':/ ')
    return ' '.join(words.split()[:6])


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Asserts that what is done takes no more memory than twice a file's size and a constant, on Linux."""
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
