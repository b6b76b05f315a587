"""Who owns which block of the KV pool, and which blocks hold what content. Integers only."""

from __future__ import annotations

import itertools
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from cupaged.engine.sequence import Sequence


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
        self._owners = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, 0, -1))  # without an owner and nothing to lose: used first, from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # without an owner, but to be found: used next, in this order
        # The key to a full block: the number of the block before it (0: none), and its tokens. A block gets a new number when
        # it is taken, so a number stands for all tokens up to there: what is found is equal, and not only of an equal hash.
        self._numbers = itertools.count(1)
        self._number_of = [0] * num_blocks
        self._key = struct.Struct(f"q{block_size}i").pack
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks  # of those that can be found
        # What is left of sequences that had published their first block only, by its number: their tokens, their full blocks,
        # and the numbers of these, which tell whether somebody has taken them since.
        self._unpublished: dict[int, list[tuple[list[int], array[int], list[int]]]] = {}
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
        return len(self._blank) + len(self._cached)

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
        return len(self._cached)

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
                before = self._number_of[block]
                if not found:
                    self._publish_all(before, running)
                found.append(block)
        num_shared = sum(self._owners[block] > 0 for block in found)
        if -(-seq.num_tokens // self.block_size) - num_shared + spare > self.num_free:
            return False
        for block in found:
            self._owners[block] += 1
            seq.page_table.append(block)
            self._cached.pop(block, None)
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
        if len(shared) + pages - end > len(self._blank) + len(self._cached):
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
        self._disown(reversed(seq.page_table[keep:]))
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
        if seq.num_published and table:
            if seq.num_published == self.block_size and self._key_of[table[0]] is not None:
                full = self._num_full(seq)
                numbers = [self._number_of[block] for block in table[:full]]
                self._unpublished.setdefault(numbers[0], []).append((seq.token_ids, table[:full], numbers))
            else:
                self.publish(seq)
        # Last block first: a prefix is worth more the nearer it is to its beginning.
        self._disown(reversed(table[full:]))
        self._disown(reversed(table[:full]), findable=True)
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
        self._unpublished.clear()
        self._key_of = [None] * self.num_blocks
        for key, block in self._block_of.items():
            self._key_of[block] = key
        free = [block for block in [*self._cached, *range(1, self.num_blocks)] if owners[block] == 0]
        self._blank = [block for block in set(free) if self._key_of[block] is None]
        self._cached = OrderedDict.fromkeys(block for block in free if self._key_of[block] is not None)

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
        assert owners == self._owners
        for seq in sequences:
            first, last = seq.num_computed // self.block_size, seq.num_writable // self.block_size
            assert last in (0, len(seq.page_table))
            assert not any(map(self._is_shared, seq.page_table[first:last]))
        assert owners[0] == 0
        free = [*self._blank, *self._cached]
        assert sorted(free) == [block for block in range(1, self.num_blocks) if owners[block] == 0]
        assert all(self._key_of[block] is None for block in self._blank)
        unpublished = {
            block
            for entries in self._unpublished.values()
            for _, blocks, numbers in entries
            for block, number in zip(blocks, numbers, strict=True)
            if self._number_of[block] == number
        }
        assert all(self._key_of[block] is not None or block in unpublished for block in self._cached)
        assert {self._number_of[block] for block in self._block_of.values()}.issuperset(self._unpublished)
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

    def _publish_all(self, number: int, running: Iterable[Sequence]) -> None:
        """Make findable what follows the first block of this number, in running sequences and those that have left."""
        for seq in running:
            if self._num_full(seq) * self.block_size > seq.num_published > 0 and self._number_of[seq.page_table[0]] == number:
                self.publish(seq)
        for token_ids, blocks, numbers in self._unpublished.pop(number, ()):
            intact = [self._number_of[block] == old for block, old in zip(blocks, numbers, strict=True)]
            self._name(token_ids, blocks, 1, [*intact, False].index(False))
            for block in itertools.compress(blocks, intact):
                if self._key_of[block] is None and block in self._cached:  # it is not needed: another has the same content
                    del self._cached[block]
                    self._blank.append(block)

    def _name(self, token_ids: list[int], blocks: array[int], first: int, stop: int) -> None:
        """Give their keys to blocks first .. stop - 1 of those that hold these tokens."""
        size, number_of, block_of, key_of, key = self.block_size, self._number_of, self._block_of, self._key_of, self._key
        before = number_of[blocks[first - 1]] if first else 0
        for block, start in zip(blocks[first:stop], range(first * size, stop * size, size), strict=True):
            if key_of[block] is None:  # else a fork has published it, perhaps behind another block
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
        blank, cached, block_of, key_of = self._blank, self._cached, self._block_of, self._key_of
        owners, number_of = self._owners, self._number_of
        taken: list[int] = []
        for number in itertools.islice(self._numbers, count):
            if blank:
                block = blank.pop()
            else:
                block, _ = cached.popitem(last=False)
                if key_of[block] is not None:
                    del block_of[key_of[block]]
                    key_of[block] = None
                    self._unpublished.pop(number_of[block], None)  # nobody will look for what came after it
            number_of[block], owners[block] = number, 1
            taken.append(block)
        return taken

    def _disown(self, blocks: Iterable[int], findable: bool = False) -> None:
        """One owner less of each; those without any are free, and kept where their content is `findable` or has its key."""
        self._peak_used = self.peak_used
        owners, key_of, copies = self._owners, self._key_of, self._copies
        for block in blocks:
            owners[block] = num_left = owners[block] - 1
            if num_left:
                continue
            if block in copies:  # nobody needs the copy any more
                source = copies.pop(block)
                self._readers[source] -= 1
                self._disown([source])
            if findable or key_of[block] is not None:
                self._cached[block] = None
            else:
                self._blank.append(block)
