"""Feeds mutated files to the package: `python tests/fuzz/fuzz.py [checkpoints|folders] --cases 100000 [--seed 1]`."""
import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from checkpoints import check_checkpoint, checkpoint_cases
from folders import check_folder_case, folder_cases
from hypothesis import HealthCheck, Phase, given, seed, settings

FUZZERS: dict[str, tuple[Any, Callable[[Any], str]]] = {
    'checkpoints': (checkpoint_cases, check_checkpoint),
    'folders': (folder_cases, check_folder_case),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(':')[0])
    parser.add_argument('what', choices=[*FUZZERS], nargs='?', default='checkpoints')
    parser.add_argument('--cases', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[str, int] = {}
    cases, check = FUZZERS[args.what]

    @seed(args.seed)
    @settings(
        max_examples=args.cases, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink])
    @given(cases())
    def run(case: Any) -> None:
        outcome = check(case)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if sum(outcomes.values()) % 5000 == 0:
            print(sum(outcomes.values()), file=sys.stderr, flush=True)

    run()
    for outcome, count in sorted(outcomes.items(), key=lambda item: -item[1]):
        print(f'{count:7d}  {outcome}')


if __name__ == '__main__':
    main()
