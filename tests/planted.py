"""A judge of a few lines, for tests that know what its answers must come to."""

from rlhf_fast.judges import Verdict, Vote, decide


class PlantedJudge:
    """Compares under every principle. A test plants `vote`, or the whole `verdict`."""

    def describe(self) -> dict:
        return {"backend": "planted"}

    def comparable(self, principles):
        return list(principles)

    def compare(self, pairs, ledger=None) -> list[Verdict]:
        return [self.verdict(pair) for pair in pairs]

    def verdict(self, pair) -> Verdict:
        votes = [self.vote(pair, principle) for principle in pair.principles]
        return decide(votes, [], {p.id: p.weight for p in pair.principles})

    def vote(self, pair, principle) -> Vote:
        raise AssertionError("nothing planted")
