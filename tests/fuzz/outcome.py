"""The rules for every error, for both fuzzers."""
import re

__all__ = ['check_sentence']


def check_sentence(error: Exception, name: str) -> str:
    """Checks that an error is short, names the file and can be printed. Returns the beginning of the sentence."""
    sentence = str(error)
    assert sentence.replace('\n  - ', '').isprintable(), sentence
    assert name in sentence, sentence
    assert len(sentence) < 2000, sentence
    words = re.sub(r"(^: )?'.*?'", '', sentence.split(name, 1)[1]).strip(':/ ')
    return ' '.join(words.split()[:6])
