"""Agents that have files written again: what they ask, and what proposers make of it."""

import sys
from itertools import pairwise
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speculation_sections

from kvarn.bench import edit_study, edits
from kvarn.bench.edits import Asker, Turn


def test_a_file_and_its_edits_follow_from_the_seed():
    one, other = Asker.of(3), Asker.of(3)
    one.turn(0)
    other.patch(0)
    assert one.chat[-1]["content"] == other.chat[-1]["content"]
    one.turn(1)
    assert len(one.chat) == 2 and "Here is a file" not in one.chat[-1]["content"]
    other.patch(1)
    assert len(other.chat) == 2 and "Here is a file" in other.chat[-1]["content"]


def test_a_description_changes_in_one_value():
    for task in range(len(edits.TASKS)):
        said = [edits.rewrite(task, at)[-1]["content"] for at in range(edits.VERSIONS)]
        assert len(set(said)) == edits.VERSIONS
        values = list(edits.ORDER)
        for before, after in pairwise(values):
            assert sum(x != y for x, y in zip(before, after)) == 1


def test_requests_come_version_by_version():
    agents = [[Turn([i], [at]) for at in range(2)] for i in range(3)]
    assert [(at, turn.prompt[0]) for at, turn in edits.in_turn(agents)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


def test_suffix_trees_know_other_requests(monkeypatch):
    """Answers come again with one token changed: in no prompt, or in every one."""
    monkeypatch.setattr(edit_study, "LENGTHS", (7,))
    chance = Random(0)
    files = [[chance.randrange(1000) for _ in range(60)] for _ in range(3)]

    def changed(text, at):
        return [*text[: 20 + at], -at, *text[21 + at :]]

    fresh = [[Turn([7, 8, 9], changed(text, at)) for at in range(3)] for text in files]
    shown = [[Turn([*text, 7], changed(text, at)) for at in range(3)] for text in files]
    rows = [*edit_study.played("rewrite", fresh), *edit_study.played("patch", shown)]
    about = {
        name: {"asked": 3} | edit_study.statistics(agents)
        for name, agents in (("rewrite", fresh), ("patch", shown))
    }
    result = {
        "date": "today", "git_commit": None,
        "workload": {"about": about, "matches": edit_study.MATCHES},
        "rows": [edit_study.asdict(row) for row in rows],
    }  # fmt: skip
    rewrite, patch = edit_study.table_of(result["rows"])
    assert rewrite.ratio > 3 > rewrite.ratio_all > 1.5
    assert rewrite.each[edit_study.ALONE] < 1.2 < rewrite.each["suffix"]
    assert 0.7 < patch.ratio < 1.2 and patch.each["ngram"] > 3
    assert len(edit_study.lines(result)) == 3
    page = "\n".join(speculation_sections.edited(result))
    assert "| rewrite | 7 |" in page and "3 of 3 files" in page
