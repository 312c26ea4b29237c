"""Case 5: the two-rank model runner that the engine of the report ran with. Mend `make_random`.

`core.executor.ranks[0].requests["r1"].token_ids` is what rank 0 takes the tokens of r1 to be.
"""

import random

from folovllm.learn.toy_runner import TwoRankRunner as EngineTwoRankRunner


class TwoRankRunner(EngineTwoRankRunner):
    def make_random(self, rank: int) -> random.Random:
        """Returns the source of random numbers of a rank. Each rank is a process, and calls this for itself."""
        return random.Random(self.found_at_start(rank))

    def found_at_start(self, rank: int) -> int:
        """What a process finds in the state of its generator. Here it is the same in every run, so that a trace can be
        recorded again; in the report it was not.
        """
        return 1000 + rank
