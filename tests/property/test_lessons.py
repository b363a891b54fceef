"""The buffer of lessons: whatever comes, it stays within its bounds, and its labels point right."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.speculate.train.lessons import Label, Lessons

#: (sequence, tokens decoded, whether it ends)
EVENTS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9), st.booleans()), max_size=120)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(1, 4), st.integers(1, 5), st.integers(2, 12))
def test_bounds(
    events: list[tuple[int, int, bool]], most: int, most_open: int, longest: int
) -> None:
    lessons = Lessons(most, most_open, longest)
    running: dict[int, list[int]] = {}
    ended = taken = 0
    for number, (seq, count, ends) in enumerate(events):
        tokens = running.setdefault(seq, [seq])
        start = len(tokens)
        tokens += [1000 * seq + start + i for i in range(count)]
        # a label names the token that stands at its place
        labels = [Label(p, False, [tokens[p]], [0.0]) for p in range(start, len(tokens))]
        lessons.add(seq, labels)
        if ends:
            lessons.close(seq, running.pop(seq))
            ended += 1
        assert len(lessons) <= most
        assert lessons.labels <= (most + most_open) * longest
        if number % 11 == 10:
            found = lessons.take()
            taken += len(found)
            assert len(lessons) == 0
            for one in found:
                assert 1 <= len(one.tokens) <= longest and one.labels
                for label in one.labels:
                    assert 1 <= label.place <= len(one.tokens)
                    if label.place < len(one.tokens):
                        assert one.tokens[label.place] == label.top[0]
    assert taken + lessons.dropped + len(lessons) <= ended
