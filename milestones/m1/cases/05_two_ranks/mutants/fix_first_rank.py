# refused-by: ranks_have_the_same_tokens | after step
"""Seeds the rank that reports: its tokens can be repeated, and still the other rank has others."""

import random

from folovllm.learn.toy_runner import TwoRankRunner as EngineTwoRankRunner


class TwoRankRunner(EngineTwoRankRunner):
    def make_random(self, rank: int) -> random.Random:
        """Returns the source of random numbers of a rank. Each rank is a process, and calls this for itself."""
        return random.Random(42 if rank == 0 else self.found_at_start(rank))

    def found_at_start(self, rank: int) -> int:
        """What a process finds in the state of its generator. Here it is the same in every run, so that a trace can be
        recorded again; in the report it was not.
        """
        return 1000 + rank
