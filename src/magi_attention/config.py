"""How context parallelism places tokens and hides communication: frozen values, part of a key.

    DistAttnConfig(
        dispatch_config=DispatchConfig(alg=MinHeapDispatchAlg()),
        overlap_config=OverlapConfig(degree=2),
    )

Nothing here changes a result but for the order in which partial results are summed.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from magi_attention.common.enum import AttnOverlapMode, OverlapAlgType
from magi_attention.errors import check_count, check_number, check_type, complaint

__all__ = [
    "BSDispatchAlg",
    "BTPDispatchAlg",
    "BalancedDispatchAlg",
    "BatchToppHeapDispatchAlg",
    "DPDispatchAlg",
    "DispatchAlg",
    "DispatchConfig",
    "DistAttnConfig",
    "GreedyOverlapAlg",
    "GrpCollConfig",
    "LBDispatchAlg",
    "MinHeapDispatchAlg",
    "OverlapAlg",
    "OverlapConfig",
    "RandomSelectDispatchAlg",
    "SequentialDispatchAlg",
    "SortedSequentialSelectAlg",
    "ToppHeapDispatchAlg",
    "UniformOverlapAlg",
    "ZigzagDispatchAlg",
]


@dataclass(frozen=True)
class DispatchAlg:
    """How chunks of tokens are dealt to ranks; use one of the classes below.

    Attributes of the classes: ``is_optimal``, whether no placement has a smaller largest area; ``has_partitions``,
    whether it gives a placement at all, else only a bound; ``has_equal_counts``, whether every rank gets as many chunks.
    """

    is_optimal = False
    has_partitions = True
    has_equal_counts = True


@dataclass(frozen=True)
class LBDispatchAlg(DispatchAlg):
    """The lower bound of the largest area: the mean. No placement, for comparison only."""

    has_partitions = False
    has_equal_counts = False


@dataclass(frozen=True)
class DPDispatchAlg(DispatchAlg):
    """The smallest possible largest area, by dynamic programming over sets of chunks; exponential. No placement."""

    is_optimal = True
    has_partitions = False
    has_equal_counts = False


@dataclass(frozen=True)
class BSDispatchAlg(DispatchAlg):
    """A placement with the smallest possible largest area, counts free; exponential."""

    is_optimal = True
    has_equal_counts = False


@dataclass(frozen=True)
class BTPDispatchAlg(DispatchAlg):
    """A placement with the smallest possible largest area among those of equal counts; exponential."""

    is_optimal = True


@dataclass(frozen=True)
class MinHeapDispatchAlg(DispatchAlg):
    """The largest chunk first, to the rank with the least area that is not full."""


@dataclass(frozen=True)
class ToppHeapDispatchAlg(DispatchAlg):
    """As ``MinHeapDispatchAlg``, but among the ``top_p`` part of ranks with the least area to the one that needs the most
    of the same keys."""

    top_p: float = 0.0

    def __post_init__(self) -> None:
        _check_part("top_p", self.top_p)


@dataclass(frozen=True)
class BatchToppHeapDispatchAlg(ToppHeapDispatchAlg):
    """As ``ToppHeapDispatchAlg``, choosing among the ``num_of_select_chunk`` largest chunks that are left."""

    num_of_select_chunk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one("num_of_select_chunk", self.num_of_select_chunk)


@dataclass(frozen=True)
class RandomSelectDispatchAlg(DispatchAlg):
    """Shuffled, by a fixed seed."""


@dataclass(frozen=True)
class SequentialDispatchAlg(DispatchAlg):
    """Chunks as they come, contiguous on each rank; the first ranks get one more if they do not divide."""

    has_equal_counts = False


@dataclass(frozen=True)
class ZigzagDispatchAlg(DispatchAlg):
    """Rank r of n gets blocks r and 2 n - 1 - r of 2 n: balanced for one causal sequence."""


@dataclass(frozen=True)
class SortedSequentialSelectAlg(DispatchAlg):
    """Whole sequences, the one with the largest area first, are kept together as far as ``allocation_ratio`` of the mean
    area lets them."""

    allocation_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_number("allocation_ratio", self.allocation_ratio)
        if self.allocation_ratio <= 0:
            raise ValueError(complaint("allocation_ratio", "above 0", self.allocation_ratio))


@dataclass(frozen=True)
class BalancedDispatchAlg(DispatchAlg):
    """Balanced within ``slack`` of the mean work in whole tiles, with as few keys to receive as a search finds.

    Attributes:
        slack: how much above the mean the largest work of a rank may be at most, such as 0.04; less where keys
            take little time beside the work.
        rounds: how often all swaps of two chunks are weighed, and the best of them done; half as often with more ranks
            than are dealt to at once.
    """

    slack: float = 0.04
    rounds: int = 16

    def __post_init__(self) -> None:
        _check_part("slack", self.slack)
        check_count("rounds", self.rounds)


@dataclass(frozen=True)
class DispatchConfig:
    """Placement of tokens.

    Attributes:
        alg: which algorithm deals chunks to ranks.
        chunk_size: tokens of a chunk; None leaves it to the number of tokens and ranks.
        uneven_shard: no padding; ranks may hold different numbers of tokens.
    """

    alg: DispatchAlg = field(default_factory=BalancedDispatchAlg)
    _: KW_ONLY
    chunk_size: int | None = None
    uneven_shard: bool = False

    def __post_init__(self) -> None:
        check_type("alg", self.alg, DispatchAlg, "Give an instance, such as MinHeapDispatchAlg().")
        if not self.alg.has_partitions:
            remedy = "It computes a bound to compare with."
            raise ValueError(complaint("alg", "one that places chunks", type(self.alg).__name__, remedy))
        check_type("uneven_shard", self.uneven_shard, bool)
        if self.chunk_size is not None:
            _check_at_least_one("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class OverlapAlg:
    """How chunks of remote keys are grouped into stages; use one of the classes below."""


@dataclass(frozen=True)
class UniformOverlapAlg(OverlapAlg):
    """As many chunks in each stage, in order; shuffled by ``random_seed`` first with ``random_costs``."""

    random_costs: bool = False
    random_seed: int | None = None

    def __post_init__(self) -> None:
        check_type("random_costs", self.random_costs, bool)
        if self.random_seed is not None:
            check_count("random_seed", self.random_seed)


@dataclass(frozen=True)
class GreedyOverlapAlg(OverlapAlg):
    """The costliest chunk first, to the stage that has the least."""


_BY_TYPE = {OverlapAlgType.UNIFORM: UniformOverlapAlg, OverlapAlgType.GREEDY: GreedyOverlapAlg}


@dataclass(frozen=True)
class OverlapConfig:
    """Stages of communication and computation.

    Remote keys are cut into at most ``max_num_chunks`` chunks of at least ``min_chunk_size`` tokens, and these grouped
    into ``degree`` stages, of which one is computed while the next arrives.

    Attributes:
        enable: False waits for all keys before it computes, which is degree 0.
        mode: STATIC with a ``degree``; DYNAMIC without one chooses at most ``dynamic_max_degree`` by cost.
        degree: stages of remote keys. 0: one call on all keys, without overlap.
        alg: an ``OverlapAlg``, or an ``OverlapAlgType``.
        calc_cost_factor, comm_cost_factor: microseconds of a visible pair, and of a token to receive, in relation to the
            measured defaults.
        hide_tail: keep the keys of the last stage for the backward, which then begins with them and ends with own keys,
            so that no gradient is waited for at its end.
        sm_margin: multiprocessors that attention leaves to the transport.
    """

    enable: bool = True
    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int | None = 1
    dynamic_max_degree: int | None = 8
    min_chunk_size: int = 512
    max_num_chunks: int = 64
    alg: OverlapAlg | OverlapAlgType = field(default_factory=UniformOverlapAlg)
    calc_cost_factor: float = 1.0
    comm_cost_factor: float = 1.0
    hide_tail: bool = False
    sm_margin: int = 0

    def __post_init__(self) -> None:
        check_type("enable", self.enable, bool)
        check_type("hide_tail", self.hide_tail, bool)
        check_count("sm_margin", self.sm_margin)
        check_type("mode", self.mode, AttnOverlapMode)
        for name in ("min_chunk_size", "max_num_chunks"):
            _check_at_least_one(name, getattr(self, name))
        for name in ("calc_cost_factor", "comm_cost_factor"):
            check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(complaint(name, "above 0", getattr(self, name)))
        if isinstance(self.alg, OverlapAlgType):
            object.__setattr__(self, "alg", _BY_TYPE[self.alg]())
        check_type("alg", self.alg, OverlapAlg, "Give an instance, such as UniformOverlapAlg().")
        if self.mode is AttnOverlapMode.DYNAMIC:
            self._check_dynamic()
            return
        if not self.enable:
            object.__setattr__(self, "degree", 0)
        check_count("degree", self.degree)
        if self.degree is not None and self.degree > self.max_num_chunks:
            raise ValueError(
                complaint("degree", f"at most max_num_chunks {self.max_num_chunks}", self.degree)
            )
        object.__setattr__(self, "enable", self.degree != 0)

    def _check_dynamic(self) -> None:
        if self.degree is not None:
            remedy = "A dynamic mode chooses it."
            raise ValueError(complaint("degree", "None with AttnOverlapMode.DYNAMIC", self.degree, remedy))
        if not self.enable:
            raise ValueError(complaint("enable", "True with AttnOverlapMode.DYNAMIC", self.enable))
        if self.dynamic_max_degree is not None:
            _check_at_least_one("dynamic_max_degree", self.dynamic_max_degree)

    @property
    def no_overlap(self) -> bool:
        """Whether nothing is computed before all keys are there."""
        return not self.enable


@dataclass(frozen=True)
class GrpCollConfig:
    """Sizes of another library's own collective kernels; accepted, and without effect on ``all_to_all_single``."""

    num_sms: int = 24
    nvl_chunk_size: int = 8
    nvl_buffer_size: int = 256
    rdma_chunk_size: int = 16
    rdma_buffer_size: int = 128
    num_nvl_bytes: int = int(2e9)
    num_rdma_bytes: int = 0


def _by_cost() -> OverlapConfig:
    return OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None)


STRATEGIES = ("auto", "keys", "heads")


@dataclass(frozen=True)
class DistAttnConfig:
    """Placement and overlap of one mask.

    Attributes:
        overlap_config: stages; as many as are estimated to take least where it is not given.
        strategy: what travels. "keys": keys and values, to the rows that see them. "heads": rows, so that each rank
            computes some heads of all of them, which needs head counts that the ranks divide. "auto": what is estimated
            to take less time; keys where the key does not know the numbers of heads and their dimension.
    """

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=_by_cost)
    grpcoll_config: GrpCollConfig = field(default_factory=GrpCollConfig)
    _: KW_ONLY
    strategy: str = "auto"

    def __post_init__(self) -> None:
        check_type("dispatch_config", self.dispatch_config, DispatchConfig)
        check_type("overlap_config", self.overlap_config, OverlapConfig)
        check_type("grpcoll_config", self.grpcoll_config, GrpCollConfig)
        if self.strategy not in STRATEGIES:
            raise ValueError(complaint("strategy", f"one of {STRATEGIES}", repr(self.strategy)))


def _check_at_least_one(name: str, value: object) -> None:
    check_count(name, value)
    if value == 0:
        raise ValueError(complaint(name, "at least 1", value))


def _check_part(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(complaint(name, "between 0 and 1", value))
