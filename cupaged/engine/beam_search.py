"""Beam search: the most probable completions, as far as keeping a few at a time finds them, over forked page tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from cupaged.engine.engine import Engine
from cupaged.engine.sequence import Sequence
from cupaged.errors import InvalidArgument, OutOfMemory


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search; names are vLLM's.

    Attributes:
        beam_width: completions that are kept from step to step, and returned.
        max_tokens: the most tokens of one.
        ignore_eos: go on past the model's end-of-sequence tokens.
        temperature: 0; there for scripts written for vLLM, for beams are ranked and nothing is drawn.
        length_penalty: a completion of n tokens (its end not counted) is worth the sum of its log-probabilities over n to this
            power (Wu et al. 2016, section 7, simplified as is common); above 0 favours longer ones.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least 1")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgument(f"ignore_eos is {self.ignore_eos!r}; give True or False")
        if self.temperature != 0:
            raise InvalidArgument(f"temperature is {self.temperature!r}; leave it at 0, or draw with generate and n")
        number = isinstance(self.length_penalty, (int, float)) and not isinstance(self.length_penalty, bool)
        if not number or not -10 <= self.length_penalty <= 10:
            raise InvalidArgument(f"length_penalty is {self.length_penalty!r}; give a number from -10 to 10")


@dataclass
class Beam:
    """A completion in the search: its tokens, an end-of-sequence token included, and the sum of their log-probabilities."""

    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    ended: bool = False  # by an end-of-sequence token

    def score(self, length_penalty: float) -> float:
        return self.cumulative_logprob / max(1, len(self.token_ids) - self.ended) ** length_penalty


def beam_search(engine: Engine, token_ids: list[int], params: BeamSearchParams) -> list[Beam]:
    """The params.beam_width best completions found, best first.

    Each step extends every kept completion by its 2 * beam_width most probable tokens, sets those aside that end by it, and
    keeps the beam_width most probable of the others. OutOfMemory where the pool cannot hold them beside what runs.
    """
    engine.check_prompt(token_ids, num_new=1)
    width, penalty = params.beam_width, params.length_penalty
    if width > engine.scheduler.max_num_batched_tokens:
        most = engine.scheduler.max_num_batched_tokens
        raise InvalidArgument(f"beam_width is {width} and a step computes {most} tokens; raise max_num_batched_tokens")
    num_new = min(params.max_tokens, engine.max_model_len - len(token_ids), engine.blocks.capacity - len(token_ids))
    finished: list[Beam] = []
    alive = [(Beam(), Sequence(list(token_ids), len(token_ids), len(token_ids) + num_new))]
    with engine.beside_the_scheduler():
        engine.others.add(alive[0][1])
        if not engine.blocks.admit(alive[0][1], engine.scheduler.running):
            raise _no_room()
        while alive and len(alive[0][0].token_ids) < num_new and not _is_decided(alive, finished, params, num_new):
            found: list[tuple[float, int, int]] = []  # minus the sum of log-probabilities, which beam, token
            for index, best in enumerate(_continuations(engine, [seq for _, seq in alive], 2 * width)):
                found += [(-alive[index][0].cumulative_logprob - logprob, index, token) for token, logprob in best]
            kept: list[tuple[float, int, int]] = []
            for negative, index, token in sorted(found):
                if token in engine.eos_token_ids and not params.ignore_eos:
                    finished.append(Beam([*alive[index][0].token_ids, token], -negative, ended=True))
                elif len(kept) < width:
                    kept.append((-negative, index, token))
            alive = _continue(engine, alive, kept)
    finished += [beam for beam, _ in alive]
    return sorted(finished, key=lambda beam: -beam.score(penalty))[:width]


def _is_decided(alive: list[tuple[Beam, Sequence]], finished: list[Beam], params: BeamSearchParams, num_new: int) -> bool:
    """Whether nothing that the kept completions may turn into can be worth more than what has ended."""
    if len(finished) < params.beam_width:
        return False
    worst = sorted((beam.score(params.length_penalty) for beam in finished), reverse=True)[params.beam_width - 1]
    # A sum of log-probabilities only falls; what it is divided by is largest at one end of the lengths to come.
    lengths = (max(1, len(alive[0][0].token_ids)), num_new)
    best = max(beam.cumulative_logprob for beam, _ in alive)
    return max(best / length**params.length_penalty for length in lengths) <= worst


def _no_room() -> OutOfMemory:
    return OutOfMemory("the KV pool cannot hold the beams; lower beam_width or max_tokens, or raise kv_memory")


def _continuations(engine: Engine, sequences: list[Sequence], count: int) -> list[list[tuple[int, float]]]:
    """The `count` most probable tokens to follow each, with their log-probabilities; what is missing is computed."""
    ops, budget = engine.model.ops, engine.scheduler.max_num_batched_tokens
    if not all(engine.blocks.grow(seq, seq.num_tokens) for seq in sequences):
        raise _no_room()
    last = False
    while not last:  # more than once only for a prompt, which is alone
        room, scheduled = budget, []
        for seq in sequences:
            scheduled.append((seq, min(seq.num_tokens - seq.num_computed, room)))
            room -= scheduled[-1][1]
        last = all(seq.num_computed + new == seq.num_tokens for seq, new in scheduled)
        logits = engine.compute(scheduled, [(seq, [seq.num_tokens - 1]) for seq in sequences] if last else [])
        for seq in sequences:
            engine.blocks.publish(seq)
    tokens = ops.largest(logits, min(count, engine.model.config.vocab_size))
    pairs = zip(ops.download(tokens).tolist(), ops.download(ops.logprobs(logits, tokens)).tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


def _continue(
    engine: Engine, alive: list[tuple[Beam, Sequence]], kept: list[tuple[float, int, int]]
) -> list[tuple[Beam, Sequence]]:
    """What was kept: the first continuation of a beam takes its sequence over, others fork it; what has none is dropped."""
    following: list[tuple[Beam, Sequence]] = []
    taken: set[int] = set()
    for total, index, token in kept:
        beam, seq = alive[index]
        if index in taken:
            seq = engine.blocks.fork(seq)
            engine.others.add(seq)
        taken.add(index)
        following.append((Beam([*beam.token_ids, token], total), seq))
    for index, (_, seq) in enumerate(alive):
        if index not in taken:
            engine.drop(seq)
    for beam, seq in following:  # only now: what forks were made of had to be without them
        seq.token_ids.append(beam.token_ids[-1])
    return following
