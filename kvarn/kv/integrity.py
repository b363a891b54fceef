"""Page books recounted from what holds the pages: an idle engine checks itself, and goes on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.core.plan import PageId
from kvarn.core.seq import Seq
from kvarn.kv.prefix import NO_PAGE, PrefixIndex


@dataclass(slots=True)
class Books:
    """What is recorded of the pages of one group."""

    refs: list[int]  #: holders of each page
    indexed: bytearray  #: whether the prefix index holds it
    free: list[PageId]
    idle: list[PageId]  #: held by the index alone


def recount(pages: int, group: int, seqs: Sequence[Seq], index: PrefixIndex | None) -> Books:
    """The books of a group of so many `pages`, from its holders."""
    held = Counter(page for seq in seqs if seq.tables for page in seq.tables[group])
    held.update(page for seq in seqs if seq.spare for page in seq.spare[group])
    known = Counter(page for node in (index.nodes() if index else []) for page in node.pages[group])
    del held[NO_PAGE], known[NO_PAGE]
    every = range(pages)
    return Books(
        [held[page] + known[page] for page in every],
        bytearray(known[page] > 0 for page in every),
        [page for page in every if not held[page] and not known[page]],
        sorted(page for page in known if not held[page]),
    )


def compare(group: int, books: Books, found: Books) -> list[str]:
    """Each difference in words; none is the only good answer."""
    problems = [
        f"group {group} page {page}: counted {found.refs[page]} holders (indexed: "
        f"{bool(found.indexed[page])}), recorded {books.refs[page]} ({bool(books.indexed[page])})"
        for page in range(len(found.refs))
        if (found.refs[page], found.indexed[page]) != (books.refs[page], books.indexed[page])
    ]
    if set(found.idle) != set(books.idle):
        problems.append(f"group {group}: {len(books.idle)} idle, counted {len(found.idle)}")
    if sorted(books.free) != found.free:
        problems.append(f"group {group}: {len(books.free)} free, counted {len(found.free)}")
    return problems
