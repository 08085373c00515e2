"""Short training runs: on one thread, and without the figures, which take most of the time."""
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def figures() -> None:
    """For a test that looks at the figures."""


@pytest.fixture(autouse=True)
def short_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if 'figures' not in request.fixturenames:
        for name in ('draw_curves', 'draw_confusion'):
            monkeypatch.setattr(f'timm_eca.finetune.run.{name}', lambda path, *args: path.touch())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for each other on small models
    yield
    torch.set_num_threads(threads)
