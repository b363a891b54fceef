"""What long contexts cost a server of sessions: concurrency, prefill, decode, context switch.

Closed forms of "Challenges in deploying long-context transformers" (arXiv 2405.08944), at peak
unless the efficiencies are given. A session is a prompt of S tokens, then R turns of G answer
tokens with Z seconds of thought after each. Users are served in turn on one instance; one whose
KV does not fit beside the others' is swapped in from host memory, and another out, first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.devices import Device
from kvarn.cost.precision import Precision

Channel = Literal["concurrency", "prefill", "decode", "switch"]


@dataclass(slots=True, frozen=True)
class Workload:
    """Sessions that are all alike."""

    context: int  #: S, the prompt [tokens]
    answer: int  #: G, of each turn [tokens]
    turns: int = 1  #: R
    think: float = 0.0  #: Z, after each turn [s]

    def __post_init__(self) -> None:
        if min(self.context, self.answer, self.turns) < 1 or self.think < 0:
            raise ConfigError(f"a session needs tokens, turns and a think time >= 0, got {self}")


@dataclass(slots=True, frozen=True)
class SessionModel:
    """A model on an instance, as far as sessions are concerned. Rates are of the whole instance."""

    active: float  #: weights that a token is multiplied with
    weights: float  #: memory of all weights [bytes]
    read: float  #: weights that a decode step reads [bytes]; with experts less than all
    layers: int
    width: int  #: of the queries of a layer: heads x head size
    kv_per_token: float  #: [bytes]
    flops: float  #: [operations/s]
    bandwidth: float  #: [bytes/s]
    memory: float  #: [bytes]
    host: float  #: to host memory [bytes/s]
    causal: float = 2.0  #: c: operations of attention are c L h S**2; the paper's figures fit 1
    read_kv: float = 1.0  #: share of the stored KV that a decode step reads

    def kv_bytes(self, context: int) -> float:
        """K(S) = kv_per_token S [bytes]."""
        return self.kv_per_token * context

    def concurrency(self, context: int) -> float:
        """C = (M - weights) / K(S): users whose KV is resident at once; whole users: `int()`."""
        return max(0.0, self.memory - self.weights) / self.kv_bytes(context)

    def prefill(self, context: int) -> float:
        """T_pre = (2 N S + c L h S**2) / F, bound by arithmetic [s]."""
        attention = self.causal * self.layers * self.width * context**2
        return (2 * self.active * context + attention) / self.flops

    def decode(self, context: int, users: int = 1) -> float:
        """T_tok: a step that gives each of `users` a token, bound by memory [s]."""
        return (self.read + users * self.read_kv * self.kv_bytes(context)) / self.bandwidth

    def switch(self, context: int) -> float:
        """T_sw = 2 K(S) / P: one user out and one in [s]."""
        return 2 * self.kv_bytes(context) / self.host

    def critical_tokens(self) -> float:
        """Rows above which a product is bound by arithmetic: F/W, times bytes a weight, over 2."""
        return self.flops / self.bandwidth * self.weights / self.active / 2

    def alone(self, load: Workload) -> float:
        """Length of a session with nobody else there, thought included [s]."""
        turn = load.answer * self.decode(load.context)
        return self.prefill(load.context) + load.turns * (turn + load.think)

    def parts(self, load: Workload, users: int, *, batched: bool = False) -> dict[Channel, float]:
        """Service that one session needs when `users` are active, by what it is spent on [s].

        With more users than fit, taking turns means that every user has been evicted when its turn
        comes (least recently used, in a cycle): each turn swaps. `batched`: the users that are
        resident decode together and share the reading of the weights; otherwise one at a time,
        as in the paper. "concurrency" is time that a larger memory would save: the weights read
        over and over because so few users decode together.
        """
        fits = self.concurrency(load.context)
        together = self.together(load, users) if batched else 1
        at_best = users if batched else 1
        tokens = load.turns * load.answer
        here = self.decode(load.context, together) / together
        lost = here - self.decode(load.context, at_best) / at_best
        swaps = load.turns if users > max(1.0, fits) else 0
        return {
            "concurrency": tokens * lost,
            "prefill": self.prefill(load.context),
            "decode": tokens * (here - lost),
            "switch": swaps * self.switch(load.context),
        }

    def together(self, load: Workload, users: int) -> int:
        """Users whose KV is resident, at least one: those that can decode in one batch."""
        return max(1, min(users, int(self.concurrency(load.context))))

    def throughput(self, load: Workload, users: int, *, batched: bool = False) -> float:
        """Peak sessions an hour: the device never idles, or every user only waits for itself.

        The lower of the two bounds that hold for any order of service (operational analysis:
        X <= min(N / (D + Z), 1 / D)); the knee between them, and at U = C that of the swaps.
        """
        if users < 1:
            raise ConfigError(f"users must be at least 1, got {users}")
        parts = self.parts(load, users, batched=batched)
        service = sum(parts.values())
        decode = parts["decode"] + parts["concurrency"]  # of a batch, each member waits for all
        more = decode * (self.together(load, users) - 1) if batched else 0.0
        cycle = service + more + load.turns * load.think
        return 3600.0 * min(users / cycle, 1.0 / service)

    def limits(
        self, load: Workload, users: int, *, batched: bool = False
    ) -> tuple[Channel | None, dict[Channel, float]]:
        """Which channel limits these sessions: the one that takes most, and every one's share.

        None: the users think so long that the device waits for them.
        """
        parts = self.parts(load, users, batched=batched)
        total = sum(parts.values())
        shares: dict[Channel, float] = {name: part / total for name, part in parts.items()}
        if self.throughput(load, users, batched=batched) < 3600.0 / total * (1 - 1e-9):
            return None, shares
        return max(parts, key=lambda name: parts[name]), shares

    def with_technique(self, technique: "Technique", factor: float) -> "SessionModel":
        """This model when `technique` divides what it acts on by `factor` (above 1)."""
        if factor <= 1:
            raise ConfigError(f"a technique divides by more than 1, got {factor}")
        stored = factor if technique.stored else 1.0
        read = factor if technique.read else 1.0
        computed = factor if technique.computed else 1.0
        return replace(
            self,
            kv_per_token=self.kv_per_token / stored,
            read_kv=self.read_kv * stored / read,
            active=self.active / computed,
            width=max(1, round(self.width / computed)),
        )


@dataclass(slots=True, frozen=True)
class Technique:
    """What a technique makes smaller; the channels that it helps follow."""

    axis: str  #: of the KV that it works on: layer, head, token, hidden; or "reuse"
    stored: bool = False  #: bytes of KV held
    read: bool = False  #: bytes of KV that a decode step reads
    computed: bool = False  #: operations of prefill

    def signs(self) -> dict[Channel, int]:
        """+1 for each channel that gets better, 0 for the others."""
        return {
            "concurrency": int(self.stored),
            "prefill": int(self.computed),
            "decode": int(self.read),
            "switch": int(self.stored),
        }


#: the paper's taxonomy, with techniques of each kind
TECHNIQUES: Mapping[str, Technique] = {
    "layer sharing (YOCO, CLA)": Technique("layer", stored=True, read=True),
    "early layers choose the prompt (GemFilter)": Technique(
        "token", stored=True, read=True, computed=True
    ),
    "grouped or fewer heads (GQA)": Technique("head", stored=True, read=True),
    "retrieval heads (DuoAttention)": Technique("head", stored=True, read=True),
    "eviction (H2O, StreamingLLM)": Technique("token", stored=True, read=True),
    "selection (Quest, Tactic)": Technique("token", read=True),
    "sparse prefill (MInference)": Technique("token", computed=True),
    "quantised KV (FP8, INT4)": Technique("hidden", stored=True, read=True),
    "latent attention (MLA)": Technique("hidden", stored=True, read=True),
    "prefix reuse": Technique("reuse", computed=True),
}


def session_model(
    spec: ModelSpec,
    device: Device,
    numbers: Precision,
    tp: int = 1,
    *,
    mfu: float = 1.0,
    mbu: float = 1.0,
    link: float = 1.0,
) -> SessionModel:
    """`spec` on `tp` devices; the efficiencies are 1 (peak) unless fitted to measurements."""
    weights = numbers.weight_bytes(spec)
    return SessionModel(
        active=spec.n_params(),
        weights=weights,
        read=weights,
        layers=spec.n_layers,
        width=spec.n_heads * spec.head_dim,
        kv_per_token=sum(g.bytes_per_token(numbers.kv) for g in spec.groups()),
        flops=tp * mfu * device.flops[numbers.compute],
        bandwidth=tp * mbu * device.bandwidth,
        memory=tp * device.memory,
        host=tp * link * device.host.bandwidth,
    )
