"""Steps whose rows leave early, priced by their shares; what goes on where nobody computes it."""

from kvarn.core.keep import Filter
from kvarn.cost.partway import partway
from kvarn.cost.shape import Estimate, StepShape


class Rows:
    """A second a row, a tenth a sequence of it by the host."""

    name = "rows"

    def step(self, shape: StepShape) -> Estimate:
        linear, host = float(shape.n_tokens), 0.1 * shape.n_seqs
        return Estimate(linear=linear, host=host, joules=2.0 * linear, confidence=0.5)

    def idle_watts(self) -> float:
        return 0.0


def test_a_share_of_the_layers():
    spans = [(0, 100, False, 3), (50, 1, True, 0), (0, 10, False, 6)]
    found = partway(Rows(), spans, 12)
    rows = 111 * 3 / 12 + 11 * 3 / 12 + 1 * 6 / 12
    assert abs(found.linear - rows) < 1e-9
    assert abs(found.joules - 2 * rows) < 1e-9
    assert abs(found.host - (0.3 * 3 + 0.2 * 3 + 0.1 * 6) / 12) < 1e-9
    assert abs(found.confidence - 0.5) < 1e-9


def test_a_step_that_nobody_leaves_is_a_whole_one():
    spans = [(0, 64, True, 0), (9, 1, True, 0)]
    assert partway(Rows(), spans, 12).linear == 65.0


def test_tokens_at_even_distances():
    for n in (41, 42, 80, 1000):
        found = Filter(3, 40, 2, 6).spread(n)
        assert len(set(found)) == 40 and found == sorted(found)
        assert found[:2] == [0, 1] and found[-6:] == list(range(n - 6, n))
