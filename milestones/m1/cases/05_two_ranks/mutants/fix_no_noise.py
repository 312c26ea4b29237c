# refused-by: draws_differ | the same number
"""Takes the noise away: the ranks agree, and a temperature does nothing any more."""

import random

from folovllm.learn.toy_runner import TwoRankRunner as EngineTwoRankRunner


class NoRandom(random.Random):
    def randrange(self, *args: int) -> int:  # type: ignore[override]
        return 0


class TwoRankRunner(EngineTwoRankRunner):
    def make_random(self, rank: int) -> random.Random:
        """Returns the source of random numbers of a rank. Each rank is a process, and calls this for itself."""
        return NoRandom(0)

    def found_at_start(self, rank: int) -> int:
        """What a process finds in the state of its generator. Here it is the same in every run, so that a trace can be
        recorded again; in the report it was not.
        """
        return 1000 + rank
