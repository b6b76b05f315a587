"""Who owns which block of the KV pool, and which blocks hold what content. Integers only."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from cupaged.engine.sequence import Sequence


class BlockManager:
    """Reference-counted blocks; full blocks are found again by the hash of all tokens up to their end.

    Block 0 is never handed out: kernels may read or write it where a page id would otherwise be undefined. A block whose
    last owner leaves keeps its content until it is needed, least recently used first, so that a later sequence with
    the same prefix takes it over instead of computing it. A fork shares all blocks of its parent; who writes into a block
    that has other owners gets a copy of it first (`copies`).
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._caching = enable_prefix_caching
        self._owners = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(1, num_blocks))  # in the order of reuse
        self._salt = secrets.token_bytes(16)  # nobody outside can prepare two prompts of one hash
        self._pack = struct.Struct(f"{block_size}q").pack
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._copies: dict[int, int] = {}  # target -> source, whose owner each is too until `copied`
        self._readers: Counter[int] = Counter()  # source -> how many copies will be made of it
        self.peak_used = 0

    @property
    def capacity(self) -> int:
        """Tokens that a single sequence can hold at most."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks without an owner, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without an owner whose content can still be found."""
        return sum(block in self._hash_of for block in self._free)

    def unused_slots(self, sequences: Iterable[Sequence]) -> int:
        """Slots of used blocks that hold no token: the pool's waste, the sequences being all that live."""
        filled: dict[int, int] = {}
        for seq in sequences:
            for index in range(seq.num_computed // self.block_size, len(seq.page_table)):
                block = seq.page_table[index]
                inside = max(0, seq.num_computed - index * self.block_size)
                filled[block] = max(filled.get(block, 0), inside)
        return len(filled) * self.block_size - sum(filled.values())

    def admit(self, seq: Sequence) -> bool:
        """Give a sequence without blocks the cached ones of its prefix, and room for all its other tokens.

        At least one token is left to compute. False, and nothing changed, if the pool has no room.
        """
        found: list[int] = []
        if self._caching and seq.use_cache:
            for index in range((seq.num_tokens - 1) // self.block_size):
                block = self._block_of.get(self._hashes(seq, index + 1)[index])
                if block is None:
                    break
                found.append(block)
        num_shared = sum(self._owners[block] > 0 for block in found)
        if -(-seq.num_tokens // self.block_size) - num_shared > len(self._free):
            return False
        for block in found:
            self._owners[block] += 1
            seq.page_table.append(block)
            self._free.pop(block, None)
        seq.num_published = len(found)
        seq.num_computed = len(found) * self.block_size
        return self.grow(seq, seq.num_tokens)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the K/V of tokens num_computed .. num_tokens - 1; False, and nothing changed, if the pool cannot.

        The blocks that these tokens are in are then the sequence's alone, once the `copies` are made.
        """
        if num_tokens <= seq.num_writable:
            return True
        table, first = seq.page_table, seq.num_computed // self.block_size
        missing = max(0, -(-num_tokens // self.block_size) - len(table))
        shared = [index for index in range(first, len(table)) if self._is_shared(table[index])]
        if missing + len(shared) > len(self._free):
            return False
        for index in shared:
            block, old = self._take(), table[index]
            if index == first and seq.num_computed % self.block_size:
                self._copies[block] = old  # inherits the ownership that the sequence gives up
                self._readers[old] += 1
            else:
                self._owners[old] -= 1  # nothing is in it
            table[index] = block
            del self._free[block]
        for _ in range(missing):
            block = self._take()
            table.append(block)
            del self._free[block]  # off the free list last: see `reconcile`
        seq.num_writable = len(table) * self.block_size
        self.peak_used = max(self.peak_used, self.num_used)
        return True

    def copies(self) -> list[tuple[int, int]]:
        """(source, target) blocks to be copied before the next forward pass; no target is a source."""
        return [(source, target) for target, source in self._copies.items()]

    def copied(self) -> None:
        """The copies have been made."""
        for source in self._copies.values():
            self._disown(source)
        self._copies.clear()
        self._readers.clear()

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence of the same tokens in the same blocks."""
        seq.num_writable = 0
        for block in seq.page_table:
            self._owners[block] += 1
        lists = {name: getattr(seq, name)[:] for name in ("token_ids", "page_table", "hashes")}
        return replace(seq, **lists, draft=[])

    def shrink(self, seq: Sequence, num_tokens: int) -> None:
        """Forget the K/V behind the first `num_tokens` tokens, which include all that is published, and their blocks."""
        keep = -(-num_tokens // self.block_size)
        if num_tokens >= seq.num_computed and keep >= len(seq.page_table):
            return
        seq.num_computed, seq.num_writable = min(seq.num_computed, num_tokens), 0
        while len(seq.page_table) > keep:
            self._disown(seq.page_table.pop())

    def publish(self, seq: Sequence) -> None:
        """Make the blocks that are full by now findable by content; call once their K/V are in the pool."""
        full = seq.num_computed // self.block_size
        if full == seq.num_published or not self._caching:
            return
        hashes = self._hashes(seq, full)
        for index in range(seq.num_published, full):
            block = seq.page_table[index]
            # Of two blocks with the same content, computed side by side, the first stays the findable one.
            if self._block_of.setdefault(hashes[index], block) == block:
                self._hash_of[block] = hashes[index]
        seq.num_published = full

    def release(self, seq: Sequence) -> None:
        """Take all blocks from the sequence; it may start over."""
        # Last block first: a prefix is worth more the nearer it is to its beginning.
        for block in reversed(seq.page_table):
            self._disown(block)
        del seq.page_table[:]
        seq.num_computed = seq.num_published = seq.num_writable = 0

    def reconcile(self, sequences: Iterable[Sequence]) -> None:
        """Make the books anew from the page tables of all living sequences, after Ctrl-C in the midst of book-keeping.

        It relies on the order of the lines above: a block is in a page table before it leaves the free list, and a copy is
        noted before its target is in a page table.
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
        order = dict.fromkeys([*self._free, *range(1, self.num_blocks)])
        self._owners = owners
        self._free = OrderedDict.fromkeys(block for block in order if owners[block] == 0)
        self._hash_of = {block: content for content, block in self._block_of.items()}

    def validate(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books agree with the page tables of all living sequences."""
        sequences, owners = list(sequences), [0] * self.num_blocks
        for seq in sequences:
            assert len(seq.page_table) * self.block_size >= seq.num_computed
            assert seq.num_published * self.block_size <= seq.num_computed
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
            assert last <= len(seq.page_table)
            assert not any(map(self._is_shared, seq.page_table[first:last]))
        assert owners[0] == 0
        assert set(self._free) == {block for block in range(1, self.num_blocks) if owners[block] == 0}
        assert {block: content for content, block in self._block_of.items()} == self._hash_of

    def _is_shared(self, block: int) -> bool:
        """Whether several sequences have it. Being copied from does not count: copies are made before anyone writes."""
        return self._owners[block] - self._readers[block] > 1

    def _take(self) -> int:
        """The block to be used next, its content forgotten; the caller removes it from the free list."""
        block = next(iter(self._free))
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]
        self._owners[block] = 1
        return block

    def _disown(self, block: int) -> None:
        """One owner less; without any the block is free."""
        self._owners[block] -= 1
        if self._owners[block]:
            return
        if block in self._copies:  # nobody needs the copy any more
            source = self._copies.pop(block)
            self._readers[source] -= 1
            self._disown(source)
        self._free[block] = None
        if block not in self._hash_of:
            self._free.move_to_end(block, last=False)  # nothing to lose: reuse it first

    def _hashes(self, seq: Sequence, count: int) -> list[bytes]:
        """Of the sequence's first `count` blocks at least: each sha256 of a block's tokens and the hash before it."""
        hashes, size = seq.hashes, self.block_size
        for start in range(len(hashes) * size, count * size, size):
            before = hashes[-1] if hashes else self._salt
            hashes.append(hashlib.sha256(before + self._pack(*seq.token_ids[start : start + size])).digest())
        return hashes
