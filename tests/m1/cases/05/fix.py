"""Case 5, solved: all ranks begin with the same seed."""

import random

from folovllm.learn.toy_runner import TwoRankRunner as EngineTwoRankRunner


class TwoRankRunner(EngineTwoRankRunner):
    def make_random(self, rank: int) -> random.Random:
        """Returns the source of random numbers of a rank. Each rank is a process, and calls this for itself."""
        return random.Random(42)
