"""A budget for the whole batch: draft where a token is likely to survive, while that pays.

Position i of a draft survives with probability a^i, a being what the sequence's drafts have been
accepted with, drawn towards the acceptance of all: the largest of many noisy shares is luck, and
how far they are drawn follows from how much sequences differ beyond luck (James and Stein). Where
drafts are trees, of w tokens a level so far, it is a level that survives, and its tokens share
that. The tokens of all sequences are taken in falling order of survival; of some numbers of them,
the one with the most expected tokens a second is drafted, by the measured times of steps with
drafts. None is a candidate like any other, by the measured times of steps without, which are
planned ahead and so cost less than such a step with no drafts in it.

An account bounds what may be lost (ours; the measure is the utility of arXiv 2506.20675 over the
batch). It is kept in plain steps. Every round without drafts pays `SHARE` of a step into it; every
round with drafts pays in what it gained over plain steps, or takes out what it lost, by the tokens
and the time that it really took. Drafts that the estimates speak for are made while there is
something in it. Where the estimates speak against them, or know nothing, they are tried, `TRIAL`
rounds at one length, by as many sequences as the account can pay for, and after each such trial
half as often. So what is lost is what the account holds at first, and `SHARE` of the time, whatever
the estimates say.

A proposer reads a sequence's prompt before it drafts for it, and nobody knows how long the sequence
will live. It is read once drafts, had it had them, would have saved as much as reading takes (the
rule of who may rent or buy). That is done on credit, and so may cost more at once than the account
holds: it owes what such rounds lose, what it is paid goes there first, and while it owes much,
nobody else is read.

Regime: the default. It needs times that repeat, and some dozen rounds to see what drafts gain.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.books import DEAREST, KEEP, SHARE, TRIAL, Account, Past, Shape, Trials
from kvarn.speculate.part import Costs, Round, Verified

PRIOR, WEIGHT = 0.5, 12  #: acceptance of a drafted token while nothing has been seen; judged tokens
KEEP_ALL = 0.998  #: weight of the past at each judged token, of all sequences
OTHERS = 16  #: judged tokens that the acceptance of all counts as, where few sequences run,
MANY, ALIKE = 4, 1e4  #: fewer than this; and where they do not differ at all
FOUND = 0.95  #: weight of the past in the share of asked tokens that the proposer finds, by round
BEGINS, STAYS = 1.10, 1.06  #: gain over no drafts that must be promised after a round without, with
PLAIN = 4  #: rounds without drafts that measure the plain step: the first does not count
#: rounds at most, up to the next trial, that follow one in which drafts did not pay and are
#: without: so many, or as many more as keep the time to think at such a share of the steps'
QUIET, THOUGHT = 8, 0.004
REFRESH = 200  #: rounds with drafts after which it is measured again
LOOKS = 1.25  #: plain steps that one with drafts takes, from which on cutting them pays for a wait
GRID = 24  #: numbers of drafted tokens that are compared
GROWS, HALF = 2, 2  #: a step is no larger than so many times what was seen, or than one more draft
#: for each second sequence: what lies further is a guess
LOOK = 32  #: once in so many rounds another number is drafted, to learn its time:
ASIDE = 0.8, 1.25, 0.6  #: these shares of the best one, in turn

FEWER = 1, 2, 4, 8  #: one of so many sequences takes part in a trial, as the account can pay for
LEAST_LOSS = 0.05  #: of a round on trial, at least, as far as the estimates know
FEW, CHEAP = 16, 0.05  #: tokens that any draft reads, and plain steps that reading may take: a
#: sequence that is further behind is read first
CREDIT = 2.0  #: plain steps that may be owed for what was read when more is
DOUBT = 1.0  #: standard errors that acceptance may be worse by, where much is read for drafts


class Survival(Part):
    """Tokens by survival, their number by the measured cost of a step."""

    name, kind = "survival", "draft-length"
    needs = frozenset({Cap.STEP_TIMES})
    regime = (
        "The default: gives drafts up where they do not pay, and loses about a hundredth of the "
        "time by finding out. Loses to the best fixed length where that is known."
    )

    def __init__(self) -> None:
        self._past: dict[SeqId, Past] = {}
        self._all = Past(PRIOR * WEIGHT, WEIGHT)  # of every sequence, those that ended too
        self._shape = Shape()
        self._found = 1.0  # of the tokens asked for, the share that the proposer finds
        self._account, self._trials = Account(), Trials()
        self._resting = 0  # rounds left that measure the plain step
        self._since = 0  # rounds with drafts since it was measured
        self._round = 0
        self._asked = 0  # tokens, in the round under way; 0: none
        self._least = 0.0  # survival below which a token costs more than it brings
        self._plain = 0.0  # the step without drafts, of the round under way [s]
        self._back = 0.0  # what going back to such steps costs [plain steps]
        self._reading: set[SeqId] = set()  # being read
        self._reads = 0.0  # of the round under way: reading takes so long [plain steps]
        self.looks = True  # what is cut from a draft that came as a whole pays for waiting for it

    def rests(self) -> bool:
        """While the plain step is measured, and after a look that found nothing."""
        self._round += 1
        if self._resting == 0 and self._since >= REFRESH:
            self._resting, self._since = PLAIN, 0
        if self._resting == 0:
            return False
        self._resting -= 1
        self._trials.wait -= 1
        self._goes_plain()
        return True

    def plan(self, round_: Round) -> list[int]:
        """Tokens for each sequence; all 0 while drafts do not pay."""
        n, costs = len(round_.seqs), round_.costs
        if not costs.knows(n):
            self._resting, self._since = PLAIN - 1, 0
            self._goes_plain()
            return [0] * n
        self._plain = costs.step(n)
        self._back = min(costs.back() / self._plain, DEAREST)
        self._account.open(n)
        self._reads = 0.0
        least = STAYS if self._asked else BEGINS
        lengths, gain = self._best(round_)
        if gain >= least:
            self._trials.repays()
            lengths = self._readable(round_, lengths, least)
            self._trials.wait -= not any(lengths)
        else:
            lengths = self._tried(round_)
        if self._account.holds <= 0.0 or not any(lengths):
            self._resting = self._quiet(costs.look())
            self._goes_plain()
            return [0] * n
        self._since += 1
        self._asked = sum(lengths)
        self.looks = costs.verifying(n + self._asked) > LOOKS * self._plain
        return lengths

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While what has been drafted is likely enough to stand."""
        return math.prod(confidence) >= self._least

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """What was accepted, found, gained and lost."""
        drafted = tokens = 0
        for one in records:
            tokens += one.accepted + 1
            if one.drafted == 0:
                past = self._past.get(one.seq)
                if past is not None:  # who is not drafted for comes back to the acceptance of all
                    past.fade(KEEP)
                continue
            drafted += one.drafted
            self._past.setdefault(one.seq, Past()).add(one.accepted, one.judged, KEEP)
            self._all.add(one.accepted, one.judged, KEEP_ALL)
            self._shape.add(one.drafted, one.depth)
        if not self._asked:
            return
        if not self._reading:
            self._found += (1.0 - FOUND) * (min(1.0, drafted / self._asked) - self._found)
        if step > 0.0 and records:
            gain = tokens / len(records) - (step + draft) / self._plain
            if self._reading and gain < 0.0:
                self._account.borrow(min(-gain, DEAREST + self._reads))
            else:
                self._account.add(gain)

    def forget(self, seq: SeqId) -> None:
        """Drop what is known of it."""
        self._past.pop(seq, None)
        self._reading.discard(seq)

    def _goes_plain(self) -> None:
        """A round without drafts."""
        self._account.add(SHARE - (self._back if self._asked else 0.0))
        self._asked = 0

    def _quiet(self, look: float) -> int:
        """Rounds to rest, as a look takes so many seconds: up to a trial, but one that is due and
        that the account cannot pay for waits as long as any."""
        quiet, wait = max(QUIET, math.ceil(look / (THOUGHT * self._plain))), self._trials.wait
        return min(quiet, wait - 1) if wait > 0 else quiet

    def _readable(self, round_: Round, lengths: list[int], least: float) -> list[int]:
        """Of these lengths, which promise at least the gain `least`, those of sequences that are
        read, or worth it; 0 everywhere if that is not enough."""
        unread = self._unread(round_)
        if not any(lengths[at] for at in unread):
            return lengths
        known, owes = round_.costs.reading(1) > 0.0, self._account.owes >= CREDIT
        wanted, (_, sure) = self._least, self._best(round_, DOUBT)
        if known and sure >= least:
            some = set() if owes else self._earned(round_, unread, sure)
            room = _without(set(unread) - some, round_.room)
            lengths, gain = self._best(replace(round_, room=room))
            if gain < least:
                return [0] * len(lengths)
        else:  # with one more there is more to go by
            self._least = wanted
            some = set() if known and owes else {next(at for at in unread if lengths[at])}
            lengths = _without(set(unread) - some, lengths)
        self._read(round_, some)
        return lengths

    def _earned(self, round_: Round, unread: Sequence[int], gain: float) -> set[int]:
        """Who has run for so long that drafts would have saved what it takes to read them."""
        saves = self._plain * (1.0 - 1.0 / gain) / len(round_.seqs)  # a token [s]
        reading = round_.costs.reading
        return {
            at for at in unread if round_.seqs[at].n_output * saves >= reading(round_.behind[at])
        }

    def _unread(self, round_: Round) -> list[int]:
        """The places of those that are far behind and not being read, the least one first."""
        far = [at for at in range(len(round_.seqs)) if self._far(round_, at)]
        self._reading.intersection_update(round_.seqs[at].id for at in far)
        unread = [at for at in far if round_.seqs[at].id not in self._reading]
        return sorted(unread, key=lambda at: round_.behind[at])

    def _far(self, round_: Round, at: int) -> bool:
        """Whether it takes a while to read this one."""
        behind, seconds = round_.behind[at] if round_.behind else 0, round_.costs.reading(1)
        return behind > FEW and not 0.0 < behind * seconds < CHEAP * self._plain

    def _read(self, round_: Round, places: Iterable[int]) -> None:
        """These are read from this round on."""
        self._reading.update(round_.seqs[at].id for at in places)
        tokens = sum(
            much for seq, much in zip(round_.seqs, round_.behind) if seq.id in self._reading
        )
        self._reads = round_.costs.reading(tokens) / self._plain

    def _tried(self, round_: Round) -> list[int]:
        """Lengths of a trial, if one is under way or due."""
        trials, n = self._trials, len(round_.seqs)
        trials.wait -= 1
        if trials.left == 0 and trials.wait <= 0:
            trials.seqs = self._affordable(round_)
            trials.left = TRIAL if trials.seqs else 0
        lengths = [0] * n
        if trials.left:
            places = self._nearest(round_, trials.seqs)
            for place in places:
                lengths[place] = min(trials.length, round_.room[place])
            self._read(round_, set(places).intersection(self._unread(round_)))
            trials.goes_on()
        return lengths

    def _nearest(self, round_: Round, seqs: int) -> list[int]:
        """So many sequences, not always the same, of which least is to be read."""
        n = len(round_.seqs)
        unread = [round_.behind[at] if self._far(round_, at) else 0 for at in range(n)]
        apart = max(1, n // seqs)
        return sorted(range(n), key=lambda at: (unread[at], (at + self._round) % apart))[:seqs]

    def _affordable(self, round_: Round) -> int:
        """How many sequences the account lets try the next length; 0: none."""
        costs, n, length = round_.costs, len(round_.seqs), self._trials.length
        levels = range(1, int(length / self._shape.width) + 1)
        tokens = self._found * sum(self._all.share**i for i in levels)
        most = n - len(self._unread(round_)) + (self._account.owes < CREDIT)
        numbers = [-(-n // fewer) for fewer in FEWER]
        if self._account.full:  # one of many teaches little, and must be read: seldom
            numbers.append(1)
        for some in numbers:
            if some * length > _most_drafts(costs, n) or some > most:
                continue
            seconds = costs.verifying(n + some * length) + costs.draft(some, length)
            loss = max(seconds / self._plain - 1.0 - tokens * some / n, LEAST_LOSS)
            if self._account.holds >= TRIAL * loss + self._back:
                return some
        return 0

    def _shares(self, round_: Round, doubt: float) -> list[float]:
        """Acceptance to expect of each: its own as far as it is known, else that of all; or worse
        by so many standard errors of that."""
        known = [self._past.get(seq.id) for seq in round_.seqs]
        own = [past for past in known if past is not None and past.judged >= 1.0]
        all_, others = self._all.share, float(OTHERS)
        if len(own) >= MANY:
            luck = all_ * (1.0 - all_)
            spread = sum((past.share - all_) ** 2 - luck / past.judged for past in own) / len(own)
            others = min(ALIKE, luck / spread) if spread > 0.0 else ALIKE
        worse = doubt * math.sqrt(all_ * (1.0 - all_) / self._all.judged)
        shares = [
            all_ if past is None else (past.accepted + others * all_) / (past.judged + others)
            for past in known
        ]
        return [max(0.0, share - worse) for share in shares]

    def _best(self, round_: Round, doubt: float = 0.0) -> tuple[list[int], float]:
        """The lengths with the most tokens a second, and their gain over none."""
        costs, n = round_.costs, len(round_.seqs)
        tokens, width = list[tuple[float, int, int, int]](), self._shape.width
        for place, (share, room) in enumerate(zip(self._shares(round_, doubt), round_.room)):
            reach, turn = share, (place + self._round) % n  # of equals, not always the same
            for count in range(1, room + 1):
                tokens.append((reach / width, turn, place, count))
                if int(count / width) > int((count - 1) / width):  # the next has a new level
                    reach *= share
        tokens.sort(reverse=True)
        del tokens[_most_drafts(costs, n) :]
        best, best_rate, self._least = 0, n / self._plain, 1.0
        expected, taken, seqs, longest = float(n), 0, 0, 0
        for part in range(1, GRID + 1):
            count = len(tokens) * part // GRID
            if count == taken:
                continue
            for reach, _, _, at in tokens[taken:count]:
                expected += self._found * reach
                seqs, longest = seqs + (at == 1), max(longest, at)
            taken, asked = count, int(self._found * count)
            seconds = costs.verifying(n + asked) + costs.draft(seqs, longest)
            if expected / seconds > best_rate:
                best, best_rate, self._least = count, expected / seconds, tokens[count - 1][0]
        if self._round % LOOK == 0:  # between two known sizes a step is cheaper than the line
            aside = ASIDE[self._round // LOOK % len(ASIDE)]
            best = min(int(best * aside), len(tokens))
        lengths = [0] * n
        for _, _, place, _ in tokens[:best]:
            lengths[place] += 1
        self._least *= 0.5  # a draft's own confidence may say more than its sequence's past
        return lengths, best_rate * self._plain / n


def _most_drafts(costs: Costs, n: int) -> int:
    """Tokens that may be drafted for `n` sequences, by what is known of larger steps."""
    return max(GROWS * costs.reach() - n, -(-n // HALF))


def _without(places: set[int], counts: Sequence[int]) -> list[int]:
    """The counts, 0 at these places."""
    return [0 if at in places else count for at, count in enumerate(counts)]
