"""Who owns which block of the KV pool, and which blocks hold what content. Integers only."""

from __future__ import annotations

import itertools
import struct
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cupaged.engine.sequence import Sequence


@dataclass(eq=False)
class _Left:
    """Full blocks that a sequence has left behind; this is their one owner. They are used again from the last one on."""

    blocks: deque[int]
    token_ids: list[int] | None = None  # of all these blocks, where only the first has its key as yet


class BlockManager:
    """Reference-counted blocks; full blocks are found again by all tokens up to their end.

    Block 0 is never handed out: kernels may read or write it where a page id would otherwise be undefined. A block whose
    last owner leaves keeps its content until it is needed, least recently used first, so that a later sequence with
    the same prefix takes it over instead of computing it. A fork shares all blocks of its parent; who writes into a block
    that has other owners gets a copy of it first (`copies`).
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._caching = enable_prefix_caching
        self._owners = [0] * num_blocks  # how many sequences and copies to be made have each; or the one `_Left` has it
        self._blank = list(range(num_blocks - 1, 0, -1))  # without an owner and nothing to lose: used first, from the end
        self._left: OrderedDict[_Left, None] = OrderedDict()  # with the others that no sequence has: used next, in this order
        self._left_in: dict[int, _Left] = {}  # where those of them are that have a key
        self._num_cached = 0  # how many they are
        # The key to a full block: the number of the block before it (0: none), and its tokens. A block gets a new number with
        # its key, so a number stands for all tokens up to there: what is found is equal, and not only of an equal hash.
        self._numbers = itertools.count(1)
        self._number_of = [0] * num_blocks
        self._key = struct.Struct(f"q{block_size}i").pack
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks  # of those that can be found
        self._copies: dict[int, int] = {}  # target -> source, whose owner each is too until `copied`
        self._readers: Counter[int] = Counter()  # source -> how many copies will be made of it
        self.num_releases = 0  # how often a sequence has given its blocks back
        self._peak_used = 0  # up to when blocks were given back last

    @property
    def capacity(self) -> int:
        """Tokens that a single sequence can hold at most."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks without an owner, cached ones included."""
        return len(self._blank) + self._num_cached

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    @property
    def peak_used(self) -> int:
        """The most blocks that ever had an owner at a time."""
        return max(self._peak_used, self.num_used)

    @property
    def num_cached(self) -> int:
        """Blocks without an owner whose content can still be found."""
        return self._num_cached

    def unused_slots(self, sequences: Iterable[Sequence]) -> int:
        """Slots of used blocks that hold no token: the pool's waste, the sequences being all that live."""
        filled: dict[int, int] = {}
        for seq in sequences:
            for index in range(seq.num_computed // self.block_size, len(seq.page_table)):
                block = seq.page_table[index]
                inside = max(0, seq.num_computed - index * self.block_size)
                filled[block] = max(filled.get(block, 0), inside)
        return len(filled) * self.block_size - sum(filled.values())

    def admit(self, seq: Sequence, running: Iterable[Sequence] = (), spare: int = 0) -> bool:
        """Give a sequence without blocks those of its prefix, cached or owned by `running` ones, and room for all other tokens.

        At least one token is left to compute. False, and nothing changed, if the pool has no room or keeps fewer than `spare`
        blocks free.
        """
        found: list[int] = []
        if self._caching and seq.use_cache:
            before, size = 0, self.block_size
            for start in range(0, seq.num_tokens - size, size):
                block = self._block_of.get(self._key(before, *seq.token_ids[start : start + size]))
                if block is None:
                    break
                if not found:
                    self._publish_all(block, running)
                before = self._number_of[block]
                found.append(block)
        num_shared = sum(block not in self._left_in for block in found)
        if -(-seq.num_tokens // self.block_size) - num_shared + spare > self.num_free:
            return False
        for block in found:
            if block in self._left_in:
                self._take_over(block)
            else:
                self._owners[block] += 1
            seq.page_table.append(block)
        seq.num_computed = seq.num_published = len(found) * self.block_size
        return self.grow(seq, seq.num_tokens)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the K/V of tokens num_computed .. num_tokens - 1; False, and nothing changed, if the pool cannot.

        The blocks that these tokens are in are then the sequence's alone, once the `copies` are made.
        """
        if num_tokens <= seq.num_writable:
            return True
        table, size = seq.page_table, self.block_size
        first, end, pages = seq.num_computed // size, len(table), -(-num_tokens // size)
        shared: list[int] = []
        if first < end:  # else it begins a block, as most decodes do that get here
            shared = [index for index in range(first, end) if self._is_shared(table[index])]
            pages = max(pages, end)
        if len(shared) + pages - end > self.num_free:
            return False
        for index in shared:
            [block], old = self._take(1), table[index]
            if index == first and seq.num_computed % size:
                self._copies[block] = old  # inherits the ownership that the sequence gives up
                self._readers[old] += 1
            else:
                self._owners[old] -= 1  # nothing is in it
            table[index] = block
        if end < pages:
            table.extend(self._take(pages - end))
        seq.num_writable = pages * size
        return True

    def begin_blocks(self, sequences: list[Sequence]) -> bool:
        """One block more for each; False, and nothing changed, if the pool cannot, or some of theirs are not theirs alone."""
        if len(sequences) > self.num_free or not all(seq.num_writable for seq in sequences):
            return False
        for seq, block in zip(sequences, self._take(len(sequences)), strict=True):
            seq.page_table.append(block)
            seq.num_writable += self.block_size
        return True

    def copies(self) -> list[tuple[int, int]]:
        """(source, target) blocks to be copied before the next forward pass; no target is a source."""
        return [(source, target) for target, source in self._copies.items()]

    def copied(self) -> None:
        """The copies have been made."""
        self._disown(self._copies.values())
        self._copies.clear()
        self._readers.clear()

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence of the same tokens in the same blocks."""
        seq.num_writable = 0
        for block in seq.page_table:
            self._owners[block] += 1
        lists = {name: getattr(seq, name)[:] for name in ("token_ids", "page_table")}
        return replace(seq, **lists, draft=[])

    def shrink(self, seq: Sequence, num_tokens: int) -> None:
        """Forget the K/V behind the first `num_tokens` tokens, which include all that is published, and their blocks."""
        keep = -(-num_tokens // self.block_size)
        if num_tokens >= seq.num_computed and keep >= len(seq.page_table):
            return
        seq.num_computed, seq.num_writable = min(seq.num_computed, num_tokens), 0
        self._disown(seq.page_table[keep:])
        del seq.page_table[keep:]

    def advance(self, scheduled: Iterable[tuple[Sequence, int]]) -> None:
        """The K/V of so many more tokens of each sequence are in the pool.

        A sequence's first block is published once it is full. The others follow when somebody comes who begins with that one
        (`admit`), be it after the sequence has given its blocks back: nobody looks for them before, and most are never found.
        """
        for seq, count in scheduled:
            seq.num_computed += count
            if not seq.num_published and seq.num_computed >= self.block_size and seq.page_table:  # else it has ended meanwhile
                self._publish(seq, min(1, self._num_full(seq)))

    def publish(self, seq: Sequence) -> None:
        """Make the blocks that are full of computed tokens, those of a draft not counted, findable by content."""
        self._publish(seq, self._num_full(seq))

    def release(self, seq: Sequence) -> None:
        """Take all blocks from the sequence, to be found by content where the first was published; it may start over."""
        table, full = seq.page_table, 0
        if seq.num_published == self.block_size and table and self._key_of[table[0]] is not None:
            full = self._num_full(seq)
            if sum(map(self._owners.__getitem__, table[:full])) > full:  # others have some of them
                full = 0
        if not full and seq.num_published and table:
            self.publish(seq)
        self._disown(table[full:])
        self._leave(table[:full], seq.token_ids)
        del table[:]
        seq.num_computed = seq.num_published = seq.num_writable = 0
        self.num_releases += 1

    def reconcile(self, sequences: Iterable[Sequence]) -> None:
        """Make the books anew from the page tables of all living sequences, after Ctrl-C in the midst of book-keeping.

        It relies on the order of the lines above: before a block is in a page table its content has been forgotten, and noted
        what is to be copied into it.
        """
        owners = [0] * self.num_blocks
        for seq in sequences:
            seq.num_writable = 0
            for block in seq.page_table:
                owners[block] += 1
        self._copies = {target: source for target, source in self._copies.items() if owners[target]}
        self._readers = Counter(self._copies.values())
        for source, count in self._readers.items():
            owners[source] += count
        self._owners = owners
        self._key_of = [None] * self.num_blocks
        for key, block in self._block_of.items():
            self._key_of[block] = key
        left = [block for each in self._left for block in reversed(each.blocks)]
        free = [block for block in dict.fromkeys([*left, *range(1, self.num_blocks)]) if owners[block] == 0]
        self._blank, self._num_cached = [block for block in free if self._key_of[block] is None], 0
        self._left.clear()
        self._left_in.clear()
        kept = [block for block in reversed(free) if self._key_of[block] is not None]
        for block in kept:
            owners[block] = 1
        self._leave(kept)

    def validate(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books agree with the page tables of all living sequences."""
        sequences, owners = list(sequences), [0] * self.num_blocks
        for seq in sequences:
            assert len(seq.page_table) * self.block_size >= seq.num_computed
            assert seq.num_published <= seq.num_computed
            for block in seq.page_table:
                owners[block] += 1
        for target, source in self._copies.items():
            owners[source] += 1
            assert owners[target] == 1
            assert target not in self._copies.values()
        assert self._readers == Counter(self._copies.values())
        cached = [block for left in self._left for block in left.blocks]
        assert self._num_cached == len(cached)
        assert not any(owners[block] for block in cached)
        found_in = {block: left for left in self._left for block in left.blocks if self._key_of[block] is not None}
        assert found_in == self._left_in
        for left in self._left:
            assert left.blocks[0] in found_in
            assert left.token_ids is not None or found_in.keys() >= set(left.blocks)
        free = [*self._blank, *cached]
        assert sorted(free) == [block for block in range(1, self.num_blocks) if owners[block] == 0]
        for block in cached:
            owners[block] = 1
        assert owners == self._owners
        for seq in sequences:
            first, last = seq.num_computed // self.block_size, seq.num_writable // self.block_size
            assert last in (0, len(seq.page_table))
            assert not any(map(self._is_shared, seq.page_table[first:last]))
        assert owners[0] == 0
        assert all(self._key_of[block] is None for block in self._blank)
        assert {key: block for block, key in enumerate(self._key_of) if key is not None} == self._block_of
        assert len({self._number_of[block] for block in self._block_of.values()} - {0}) == len(self._block_of)

    def _num_full(self, seq: Sequence) -> int:
        """Blocks full of computed tokens, those of a draft not counted."""
        return min(seq.num_computed, seq.num_tokens) // self.block_size

    def _publish(self, seq: Sequence, full: int) -> None:
        """Make the first `full` blocks of a sequence findable."""
        if self._caching:
            self._name(seq.token_ids, seq.page_table, seq.num_published // self.block_size, full)
        seq.num_published = full * self.block_size

    def _publish_all(self, first: int, running: Iterable[Sequence]) -> None:
        """Make findable what follows this first block in running sequences, or in the one that has left it behind."""
        number = self._number_of[first]
        for seq in running:
            if self._num_full(seq) * self.block_size > seq.num_published > 0 and self._number_of[seq.page_table[0]] == number:
                self.publish(seq)
        left = self._left_in.get(first)
        if left is not None and left.token_ids is not None:
            blocks = list(left.blocks)
            self._name(left.token_ids, blocks, 1, len(blocks))
            self._disown(blocks)  # those without a key are not needed: others have the same content
            del self._left[left]
            self._num_cached -= len(blocks)

    def _name(self, token_ids: list[int], blocks: array[int] | list[int], first: int, stop: int) -> None:
        """Give their keys to blocks first .. stop - 1 of those that hold these tokens."""
        size, number_of, block_of, key_of, key = self.block_size, self._number_of, self._block_of, self._key_of, self._key
        before = number_of[blocks[first - 1]] if first else 0
        for block, start in zip(blocks[first:stop], range(first * size, stop * size, size), strict=True):
            if key_of[block] is None:  # else a fork has published it, perhaps behind another block
                number_of[block] = next(self._numbers)  # before it can be found: its old one stands for other tokens
                name = key(before, *token_ids[start : start + size])
                found = block_of.setdefault(name, block)
                if found == block:
                    key_of[block] = name
                else:  # computed side by side: the first stays the findable one, and whatever follows either is the same
                    number_of[block] = number_of[found]
            before = number_of[block]

    def _is_shared(self, block: int) -> bool:
        """Whether several sequences have it. Being copied from does not count: copies are made before anyone writes."""
        return self._owners[block] - self._readers[block] > 1

    def _take(self, count: int) -> list[int]:
        """The blocks to be used next, their content forgotten."""
        key_of = self._key_of
        taken = self._blank[: -count - 1 : -1]
        del self._blank[len(self._blank) - len(taken) :]
        for block in taken:
            self._owners[block] = 1
        while len(taken) < count:
            left = next(iter(self._left))
            blocks = [left.blocks.pop() for _ in range(min(count - len(taken), len(left.blocks)))]
            self._num_cached -= len(blocks)
            if not left.blocks:
                del self._left[left]
            for block in blocks:
                if key_of[block] is not None:
                    del self._block_of[key_of[block]], self._left_in[block]
                    key_of[block] = None
            taken += blocks
        return taken

    def _disown(self, blocks: Iterable[int]) -> None:
        """One owner less of each; those without any are free, and left behind where they have a key."""
        self._peak_used = self.peak_used
        owners, key_of, copies = self._owners, self._key_of, self._copies
        kept = []
        for block in blocks:
            owners[block] = num_left = owners[block] - 1
            if num_left:
                continue
            if block in copies:  # nobody needs the copy any more
                source = copies.pop(block)
                self._readers[source] -= 1
                self._disown([source])
            if key_of[block] is None:
                self._blank.append(block)
            else:
                owners[block] = 1
                kept.append(block)
        self._leave(kept)

    def _leave(self, blocks: array[int] | list[int], token_ids: list[int] | None = None) -> None:
        """Keep these blocks, which nobody has any more, until they are needed."""
        if blocks:
            left = _Left(deque(blocks), token_ids)
            self._left[left] = None
            self._num_cached += len(blocks)
            for block in blocks:
                if self._key_of[block] is not None:
                    self._left_in[block] = left

    def _take_over(self, block: int) -> None:
        """A sequence has one of those that were left behind."""
        left = self._left_in.pop(block)
        left.blocks.remove(block)  # which is the first of them, or nearly
        self._num_cached -= 1
        if not left.blocks:
            del self._left[left]
