"""Who owns which block of the KV pool, and which blocks hold what content. Integers only."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from cupaged.engine.sequence import Sequence


class BlockManager:
    """Reference-counted blocks; full blocks are found again by the hash of all tokens up to their end.

    Block 0 is never handed out: kernels may read or write it where a page id would otherwise be undefined. A block whose
    last owner leaves keeps its content until it is needed, least recently used first, so that a later sequence with
    the same prefix takes it over instead of computing it.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._caching = enable_prefix_caching
        self._owners = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(1, num_blocks))  # in the order of reuse
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
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

    def adopt_prefix(self, seq: Sequence) -> None:
        """Give a sequence without blocks the cached blocks of its prefix; at least one token is left to compute."""
        for index in range((seq.num_tokens - 1) // self.block_size):
            content = self._content_hash(seq, index)
            block = self._block_of.get(content)
            if block is None:
                break
            self._owners[block] += 1
            seq.page_table.append(block)
            self._free.pop(block, None)
            seq.num_published, seq.content_hash = index + 1, content
        seq.num_computed = len(seq.page_table) * self.block_size
        self.peak_used = max(self.peak_used, self.num_used)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the page table to hold `num_tokens` tokens; False, and nothing changed, if the pool cannot."""
        missing = -(-num_tokens // self.block_size) - len(seq.page_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = next(iter(self._free))
            self._forget(block)
            # Off the free list last: Ctrl-C between two of these lines then loses no block.
            self._owners[block] = 1
            seq.page_table.append(block)
            del self._free[block]
        self.peak_used = max(self.peak_used, self.num_used)
        return True

    def publish(self, seq: Sequence) -> None:
        """Make the blocks that are full by now findable by content; call once their K/V are in the pool."""
        if not self._caching:
            return
        for index in range(seq.num_published, seq.num_computed // self.block_size):
            seq.content_hash = self._content_hash(seq, index)
            seq.num_published = index + 1
            block = seq.page_table[index]
            # Of two blocks with the same content, computed side by side, the first stays the findable one.
            if seq.content_hash not in self._block_of:
                self._block_of[seq.content_hash] = block
                self._hash_of[block] = seq.content_hash

    def release(self, seq: Sequence) -> None:
        """Take all blocks from the sequence; it may start over."""
        # Last block first: a prefix is worth more the nearer it is to its beginning.
        for block in reversed(seq.page_table):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # nothing to lose: reuse it first
        seq.page_table.clear()
        seq.num_computed = seq.num_published = 0
        seq.content_hash = b""

    def validate(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless the books agree with the page tables of all living sequences."""
        owners = [0] * self.num_blocks
        for seq in sequences:
            assert len(seq.page_table) * self.block_size >= seq.num_computed
            for block in seq.page_table:
                owners[block] += 1
        assert owners == self._owners
        assert owners[0] == 0
        assert set(self._free) == {block for block in range(1, self.num_blocks) if owners[block] == 0}
        assert {block: content for content, block in self._block_of.items()} == self._hash_of

    def _content_hash(self, seq: Sequence, index: int) -> bytes:
        """sha256 over block `index` and, through the hash before it, all earlier blocks; `seq` must stand at `index`."""
        tokens = seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
        return hashlib.sha256(seq.content_hash + array("q", tokens).tobytes()).digest()

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]
