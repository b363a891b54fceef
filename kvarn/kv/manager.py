"""The one owner of KV pages: who holds which page of which group, and what may be taken back.

A page is held by sequences (through their tables) and by the prefix index; `refs` counts both.
Pages that only the index holds are *idle*: they serve prefix hits until someone needs the room.
Nothing here touches memory: pages are numbers, so the simulator runs the same code.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from kvarn.core.keep import ENDLESS
from kvarn.core.model import GroupSpec, shares_of
from kvarn.core.plan import Compaction, PageCopy, PageId, TableEdit
from kvarn.core.seq import Seq
from kvarn.kv.integrity import Books, compare, recount
from kvarn.kv.prefix import NO_PAGE, Match, PrefixIndex

_NEVER = 1 << 60  # `published` of a sequence whose content is in the index under other pages


@lru_cache(16)
def _all_pages(count: int) -> tuple[PageId, ...]:
    """Every page of a pool, the first one last; the pools of a fleet share the numbers."""
    return tuple(range(count - 1, -1, -1))


class KVManager:
    """Page tables, reference counts, prefix sharing and eviction for all groups."""

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        pages: Sequence[int],
        page_size: int,
        index: PrefixIndex | None = None,
    ) -> None:
        """`pages[g]`: pages in the pool of group g."""
        self.groups = list(groups)
        self.pages = list(pages)
        self.page_size = page_size
        self.index = index
        self.has_windows = any(group.window is not None for group in groups)
        self.n_layers = len(shares_of(groups))
        self.has_heads = any(group.heads for group in groups)  #: not layers as they are
        self._start()

    def _start(self) -> None:
        self.free: list[list[PageId]] = [list(_all_pages(n)) for n in self.pages]
        self.refs: list[list[int]] = [[0] * n for n in self.pages]
        self.indexed: list[bytearray] = [bytearray(n) for n in self.pages]
        self._idle: list[OrderedDict[PageId, None]] = [OrderedDict() for _ in self.pages]

    # what is there

    def available(self, group: int) -> int:
        """Pages that could be handed out now: free ones and idle ones."""
        return len(self.free[group]) + len(self._idle[group])

    def idle(self, group: int) -> int:
        """Pages that only the prefix index holds."""
        return len(self._idle[group])

    def held(self, group: int) -> int:
        """Pages that sequences hold."""
        return self.pages[group] - self.available(group)

    def room(self, seq: Seq) -> int:
        """Most positions that `seq` could be extended by now."""
        size = self.page_size
        most = min(len(table) + self.available(group) for group, table in enumerate(seq.tables))
        return most * size - seq.computed

    def seen(self, seq: Seq, start: int) -> float:
        """Positions that the one at `start` attends to beside itself, of a head in the mean."""
        found = [group.seen(start) for group in self.groups]
        for at, keep in enumerate(seq.keep):
            found[at] = min(found[at], keep.seen(seq.prompt_len, start))
        heads = [group.n_heads for group in self.groups]
        return sum(n * share for n, share in zip(found, heads, strict=True)) / sum(heads)

    # a sequence's life

    def lookup(self, seq: Seq) -> Match | None:
        """The longest cached prefix of a waiting sequence; its last token is always computed."""
        sampling = seq.request.sampling
        if self.index is None or sampling.prompt_logprobs is not None or seq.request.pooling:
            return None  # those need the hidden state of every position
        limit = min(len(seq.tokens) - 1, self._cached(seq)) // self.page_size
        return self.index.match(seq.tokens, seq.salt, limit)

    def fits(self, seq: Seq, match: Match | None, spare: int, chunk: int) -> bool:
        """Whether the known tokens of a waiting `seq` fit, leaving `spare` pages of each group.

        A window group needs room for one window and one `chunk` at a time only [positions].
        """
        size = self.page_size
        for group, spec in enumerate(self.groups):
            cached = self._useful(match, group) if match and self._sees(seq, group) else []
            slots = self._slots(seq, group, len(seq.tokens))
            positions = slots - (match.length if match else 0) * size
            if spec.window is not None:
                positions = min(positions, spec.sinks + spec.window + chunk)
            idle = sum(1 for page in cached if page != NO_PAGE and self.refs[group][page] == 1)
            pages = -(-positions // size) + self._spares(seq, group)
            if self.available(group) - idle - spare < pages:
                return False
        return True

    def attach(self, seq: Seq, match: Match | None, now: float) -> None:
        """Give a waiting `seq` its tables: the cached prefix, or nothing yet."""
        seq.computed = 0
        seq.published = 0
        seq.spare = [[] for _ in self.groups] if seq.keep else []
        if match is None:
            seq.tables = [[] for _ in self.groups]
            if self.index is None:
                seq.published = _NEVER
            else:
                empty = self.index.match([], seq.salt, 0)
                seq.cursor = self.index.take(empty, now)
        else:
            assert self.index is not None
            seq.cursor = self.index.take(match, now)
            seq.published = match.length
            seq.computed = match.length * self.page_size
            seq.tables = []
            for group in range(len(self.groups)):
                if not self._sees(seq, group):
                    seq.tables.append([])
                    continue
                useful = self._useful(match, group)
                seq.tables.append(useful)
                for page in useful:
                    if page != NO_PAGE:
                        self._hold(group, page)
        seq.capacity = seq.computed

    def reserve(self, seq: Seq, end: int, now: float) -> list[TableEdit] | None:
        """Pages for positions up to `end`; None, and nothing changed, when there is no room.

        Full-attention groups get pages for all known tokens at once, so that a prompt that was let
        in never has to fight for the rest of its pages; window groups go chunk by chunk.
        """
        size, known = self.page_size, len(seq.tokens)
        plain = not seq.keep and seq.filter is None  # a slot for each position, and that is all
        wants: list[int] = []
        for group, spec in enumerate(self.groups):
            positions = known if known > end and spec.window is None else end
            slots = positions if plain else self._slots(seq, group, positions)
            want = max(0, -(-slots // size) - len(seq.tables[group]))
            spares = 0 if plain else self._spares(seq, group)
            if want + spares > self.available(group):
                return None
            wants.append(want)
        edits = []
        for group, want in enumerate(wants):
            if want:
                table = seq.tables[group]
                pages = self._take(group, want, now)
                edits.append(TableEdit(seq.id, group, len(table), pages))
                table += pages
            if not plain and (spares := self._spares(seq, group)):
                seq.spare[group] = self._take(group, spares, now)
        seq.capacity = self._capacity(seq)
        return edits

    def compact(self, seq: Seq, now: float) -> list[Compaction]:
        """Give a `seq` whose prompt is planned whole the tables of what stays of it.

        The step still reads the pages that are free now, so nothing more may be planned into it.
        """
        moves = []
        for group, keep in enumerate(seq.keep):
            if keep.compacts(seq.prompt_len):
                self._let_go(group, reversed(seq.tables[group]))
                seq.tables[group], seq.spare[group] = seq.spare[group], []
                pages = list(seq.tables[group])
                moves.append(Compaction(seq.id, group, keep.budget, pages))
        if moves:
            self._forget_prefix(seq, now)
            seq.capacity = self._capacity(seq)
        return moves

    def _forget_prefix(self, seq: Seq, now: float) -> None:
        """What `seq` holds from here on is not what the prefix index has."""
        seq.published = _NEVER
        if self.index is not None:
            self.index.unpin(seq.cursor, now)
            empty = self.index.match([], seq.salt, 0)
            seq.cursor = self.index.take(empty, now)

    def _capacity(self, seq: Seq) -> int:
        """Positions that `seq` has slots for; all there will ever be, once its rings are there."""
        if not seq.keep and seq.filter is None:
            return min(map(len, seq.tables)) * self.page_size
        held = [
            len(table) * self.page_size if self._sees(seq, group) else ENDLESS
            for group, table in enumerate(seq.tables)
        ]
        for group, keep in enumerate(seq.keep):
            whole = keep.compacts(seq.prompt_len) and bool(seq.spare[group])
            if not whole and held[group] >= keep.budget:
                held[group] = ENDLESS
        return min(held)

    def _slots(self, seq: Seq, group: int, end: int) -> int:
        """Slots for the positions up to `end` of `seq`."""
        if seq.filter is not None and not self._sees(seq, group):
            return 0
        return seq.keep[group].slots(seq.prompt_len, seq.computed, end) if seq.keep else end

    def _sees(self, seq: Seq, group: int) -> bool:
        """Whether a layer of `group` computes anything of `seq` as it is now."""
        return seq.filter is None or self.groups[group].layers[0] < seq.filter.layers

    def _spares(self, seq: Seq, group: int) -> int:
        """Pages that `seq` still has to get for what will stay of its prompt."""
        if not seq.keep or not seq.keep[group].compacts(seq.prompt_len):
            return 0
        held = bool(seq.spare and seq.spare[group]) or seq.computed >= seq.prompt_len
        return 0 if held else -(-seq.keep[group].budget // self.page_size)

    def _cached(self, seq: Seq) -> int:
        """Leading positions of `seq` that may come from the prefix index."""
        n = seq.prompt_len
        return min((min(k.shared(n), n - k.watch) for k in seq.keep), default=ENDLESS)

    def can_fork(self, parent: Seq, child: Seq) -> bool:
        """Whether `parent` still has every page of its prompt that the child's queries can see."""
        if parent.keep or parent.filter is not None:
            return False  # its prompt is compacted, or filtered, or soon will be
        whole, partial = divmod(child.prompt_len - 1, self.page_size)
        end = whole + (partial > 0)
        for spec, table in zip(self.groups, parent.tables):
            first = 0 if spec.window is None else max(0, child.prompt_len - spec.window)
            if NO_PAGE in table[first // self.page_size : end]:
                return False
        return True

    def fork(self, parent: Seq, child: Seq, now: float) -> list[PageCopy] | None:
        """Give `child` its parent's prompt: whole pages shared, the partial last page copied.

        The child recomputes the prompt's last position (its logits choose the child's first token)
        and so writes to the last page at once: copy-on-write with the write already due. None, and
        nothing changed, when there is no room for that page.
        """
        shared = child.prompt_len - 1  # positions
        whole, partial = divmod(shared, self.page_size)
        if any(self.available(group) < 1 for group in range(len(self.groups))):
            return None
        copies = []
        self._fork_cursor(parent, child, whole, now)
        child.tables = []
        for group, table in enumerate(parent.tables):
            mine = table[:whole]
            for page in mine:
                if page != NO_PAGE:
                    self._hold(group, page)
            if partial:
                tail = self._take(group, 1, now)[0]
                copies.append(PageCopy(group, table[whole], tail))
                mine.append(tail)
            child.tables.append(mine)
        child.computed = shared
        child.capacity = len(child.tables[0]) * self.page_size
        return copies

    def _fork_cursor(self, parent: Seq, child: Seq, whole: int, now: float) -> None:
        """Pin the shared pages for `child`; publish nothing if they are not what the index has."""
        child.published = _NEVER
        if self.index is None:
            return
        salt = child.request.cache_salt
        match = self.index.match(child.tokens, salt, whole)
        shared = [table[:whole] for table in parent.tables]
        if match.length == whole and match.pages[0] == shared[0]:
            child.published = whole
        else:
            match = self.index.match([], salt, 0)
        child.cursor = self.index.take(match, now)

    def slide(self, seq: Seq, start: int) -> None:
        """Give back what no query from position `start` on can see (window groups only)."""
        for group, spec in enumerate(self.groups):
            if spec.window is None:
                continue
            table = seq.tables[group]
            at = min(len(table), max(0, start - spec.window + 1) // self.page_size) - 1
            stay = spec.sink_pages(self.page_size)
            while at >= stay and table[at] != NO_PAGE:
                self._let_go(group, (table[at],))
                table[at] = NO_PAGE
                at -= 1

    def publish(self, seq: Seq, now: float) -> None:
        """Enter the whole pages that `seq` has computed (or will, in the step being planned)."""
        index, size = self.index, self.page_size
        whole = min(seq.computed, len(seq.tokens)) // size
        if seq.keep:
            whole = min(whole, min(k.shared(seq.prompt_len) for k in seq.keep) // size)
        if index is None or whole <= seq.published:
            return
        start = seq.published
        nothing = [NO_PAGE] * (whole - start)
        pages = [table[start:whole] or list(nothing) for table in seq.tables]
        node = index.insert(seq.cursor, seq.tokens[start * size : whole * size], pages, now)
        if node is None:  # somebody computed the same content; ours stays our own
            seq.published = _NEVER
            return
        if node is not seq.cursor:
            index.pin(node)
            index.unpin(seq.cursor, now)
            seq.cursor = node
        for group, group_pages in enumerate(pages):
            for page in group_pages:
                if page != NO_PAGE:
                    self.refs[group][page] += 1
                    self.indexed[group][page] = 1
        seq.published = whole

    def release(self, seq: Seq, now: float, keep: bool = True) -> None:
        """Take everything from `seq`; what it published stays for prefix hits.

        `keep=False` after a failed step: what was computed last is not entered.
        """
        if keep:
            self.publish(seq, now)
        for held in (seq.tables, seq.spare):
            for group, pages in enumerate(held):
                self._let_go(group, reversed(pages))
        if self.index is not None and seq.cursor is not None:
            self.index.unpin(seq.cursor, now)
        seq.tables, seq.spare, seq.cursor, seq.published = [], [], None, 0
        seq.computed = seq.capacity = 0

    def clear(self, now: float) -> int:
        """Drop every idle page from the prefix index; the number of pages given up."""
        dropped = 0
        for group in range(len(self.groups)):
            count = self.idle(group)
            dropped += count
            if count:
                self._reclaim(group, count, now)
        return dropped

    # pages

    def _useful(self, match: Match, group: int) -> list[PageId]:
        """A table of the matched pages that a query after the match can see; NO_PAGE elsewhere."""
        pages, spec = list(match.pages[group]), self.groups[group]
        if spec.window is None:
            return pages
        first = max(0, match.length * self.page_size - spec.window + 1) // self.page_size
        stay = min(first, spec.sink_pages(self.page_size))
        return pages[:stay] + [NO_PAGE] * (first - stay) + pages[first:]

    def _take(self, group: int, count: int, now: float) -> list[PageId]:
        """`count` pages, each with one holder; the caller has checked that they are available."""
        free = self.free[group]
        if len(free) < count:
            self._reclaim(group, count - len(free), now)
        refs = self.refs[group]
        taken = [free.pop() for _ in range(count)]
        for page in taken:
            refs[page] = 1
        return taken

    def _hold(self, group: int, page: PageId) -> None:
        if self.refs[group][page] == 1 and self.indexed[group][page]:
            self._idle[group].pop(page, None)
        self.refs[group][page] += 1

    def _let_go(self, group: int, pages: Iterable[PageId]) -> None:
        refs, free, indexed = self.refs[group], self.free[group], self.indexed[group]
        for page in pages:
            if page == NO_PAGE:
                continue
            refs[page] = left = refs[page] - 1
            if left == 0:
                free.append(page)
            elif left == 1 and indexed[page]:
                self._idle[group][page] = None

    def _reclaim(self, group: int, count: int, now: float) -> None:
        """Turn at least `count` idle pages of `group` into free ones."""
        assert self.index is not None
        if self.groups[group].window is None:
            least = len(self.free[group]) + count
            while len(self.free[group]) < least:  # some hold pages of other groups only
                for other, pages in enumerate(self.index.evict(least - len(self.free[group]), now)):
                    for page in pages:
                        self._unindex(other, page)
        else:  # a window's pages are useful one by one: the longest idle go first
            for page in [p for p, _ in zip(self._idle[group], range(count))]:
                self.index.forget(group, page)
                self._unindex(group, page)

    def _unindex(self, group: int, page: PageId) -> None:
        self._idle[group].pop(page, None)
        self.indexed[group][page] = 0
        self.refs[group][page] = 0
        self.free[group].append(page)

    # trust

    def check_integrity(self, seqs: Iterable[Seq]) -> list[str]:
        """Recount every page from the tables and the index; repair and describe each difference.

        Called when the engine is idle and by tests; an empty list is the only good answer.
        """
        seqs = list(seqs)
        problems = []
        for group, pages in enumerate(self.pages):
            found = recount(pages, group, seqs, self.index)
            books = Books(
                self.refs[group], self.indexed[group], self.free[group], list(self._idle[group])
            )
            differences = compare(group, books, found)
            if differences:
                problems += differences
                self.refs[group], self.indexed[group] = found.refs, found.indexed
                self.free[group] = found.free
                self._idle[group] = OrderedDict.fromkeys(found.idle)
        return problems
