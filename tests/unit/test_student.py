"""A student learns from lessons, goes back to what it was, and says when its loss is no number."""

from typing import get_args

import pytest
import torch
from unit.test_drafter import SPEC, tiny_network, tiny_samples

from kvarn.speculate.train.drafter import logprobs_of
from kvarn.speculate.train.lessons import Label, Lesson
from kvarn.speculate.train.student import Loss, Recipe, Student, lesson_loss


def tiny_lessons(wrong_every: int = 3) -> list[Lesson]:
    """What the tiny target said of its own texts; every third place was judged wrong."""
    found = []
    for sample in tiny_samples():
        labels = [
            Label(
                sample.prompt + at, at % wrong_every == 0, sample.top[at].tolist(),
                sample.logprobs[at].tolist(),
            )
            for at in range(len(sample.top))
        ]  # fmt: skip
        found.append(Lesson(sample.tokens.tolist()[:-1], labels))
    return found


def everyone() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("loss", get_args(Loss))
def test_learning_lowers_every_loss(loss: Loss) -> None:
    how = Recipe(loss, rate=1e-2, warmup=1, passes=4, others=97)
    student, lessons = Student(tiny_network(), how), tiny_lessons()

    def now() -> float:
        with torch.no_grad():
            return lesson_loss(student.network, lessons, how, everyone()).item()

    first = now()
    assert student.learn(lessons) is not None
    assert now() < 0.95 * first
    assert student.labels == 4 * sum(len(one.labels) for one in lessons)


@pytest.mark.parametrize("loss", ["forward", "reverse", "jsd"])
def test_a_drafter_that_says_what_the_target_says_has_nothing_to_learn(loss: Loss) -> None:
    network, how = tiny_network(), Recipe(loss, others=97)
    (lesson,) = tiny_lessons()[:1]
    states = network(torch.tensor([lesson.tokens]))[0, [one.place - 1 for one in lesson.labels]]
    top = torch.tensor([one.top for one in lesson.labels])
    own = logprobs_of(network, states, top, 97, everyone())
    for label, logprobs in zip(lesson.labels, own.tolist(), strict=True):
        label.logprobs = logprobs
    assert lesson_loss(network, [lesson], how, everyone()).item() == pytest.approx(0, abs=1e-4)


def test_only_refused_places_where_asked() -> None:
    student, lessons = Student(tiny_network(), Recipe(wrong_only=True, passes=1)), tiny_lessons()
    student.learn(lessons)
    assert student.labels == sum(one.wrong for lesson in lessons for one in lesson.labels)
    right = [Lesson(one.tokens, [x for x in one.labels if not x.wrong]) for one in lessons]
    assert student.learn(right) is None and student.learn([]) is None


def test_going_back_is_exact_and_a_copy_does_not_follow() -> None:
    student, lessons = Student(tiny_network(), Recipe()), tiny_lessons()
    before = student.weights()
    student.learn(lessons)
    after = student.weights()
    assert any(not torch.equal(after[name], x) for name, x in before.items())
    student.restore(before)
    assert all(torch.equal(x, before[name]) for name, x in student.weights().items())
    assert set(before) == set(tiny_network().state_dict()) and SPEC.vocab == 97


def test_stopping_is_between_lessons() -> None:
    """What is stopped within a batch has learnt from the batches before, and no more."""
    one, stopped, none = (Student(tiny_network(), Recipe(batch=2, passes=1)) for _ in range(3))
    asks = 1 + 2 * len(one.network.layers)  # of a lesson
    for student, lessons in ((one, 2), (stopped, 3)):
        told = iter([True] * lessons * asks + [False] * asks)
        assert student.learn(tiny_lessons(), lambda told=told: next(told)) is not None
        assert 0 < student.labels <= 2 * 14
    assert all(torch.equal(x, one.weights()[name]) for name, x in stopped.weights().items())
    told = iter([True] * asks + [False] * asks)
    assert none.learn(tiny_lessons(), lambda: next(told)) is None and none.labels == 0


def test_it_can_pause_between_layers_and_learns_the_same() -> None:
    asked, lessons = list[int](), tiny_lessons()
    straight, paused = (Student(tiny_network(), Recipe(passes=1)) for _ in range(2))
    straight.learn(lessons)

    def go_on() -> bool:
        asked.append(1)
        return True

    paused.learn(lessons, go_on)
    layers = len(paused.network.layers)
    assert len(asked) == len(lessons) * (1 + 2 * layers)
    assert all(torch.equal(x, straight.weights()[name]) for name, x in paused.weights().items())


def test_a_loss_that_is_no_number_is_an_error() -> None:
    student = Student(tiny_network(), Recipe())
    weights = {name: torch.full_like(x, float("nan")) for name, x in student.weights().items()}
    student.restore(weights)
    with pytest.raises(FloatingPointError, match="nan"):
        student.learn(tiny_lessons())


def test_the_rate_rises_anew_after_going_back() -> None:
    student, lessons = Student(tiny_network(), Recipe(warmup=4, passes=1)), tiny_lessons()
    found = []
    for update in range(6):
        student.learn(lessons)
        found.append(student._optimizer.param_groups[0]["lr"] / student.how.rate)
        if update == 4:
            student.restore(student.weights())
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.25])
