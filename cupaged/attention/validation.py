"""What `plan` is given, checked: each check sees a whole batch at once, and looks for who is to blame only if it must."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupaged.errors import InvalidArgument


@dataclass
class PageTable:
    """Page tables, checked, as a kernel reads them."""

    begin: np.ndarray  # [num_sequences], of the sequence's first entry
    indptr: np.ndarray | None
    indices: np.ndarray | None
    block_size: int  # of the pages that the entries name
    num_blocks: int
    num_entries: int  # of the tables as they were given
    rows: np.ndarray | None = None  # see Plan.pointer_rows


def check_numbers(num_heads, num_kv_heads, block_size, num_blocks, sliding_window) -> None:
    check_positive("num_heads", num_heads)
    check_positive("num_kv_heads", num_kv_heads)
    check_positive("block_size", block_size)
    check_positive("num_blocks", num_blocks)
    if sliding_window is not None:
        check_positive("sliding_window", sliding_window)
    if num_heads % num_kv_heads:
        raise InvalidArgument(f"num_heads is {num_heads}; give a multiple of num_kv_heads, {num_kv_heads}")
    if block_size > 256 or block_size & (block_size - 1):
        raise InvalidArgument(f"block_size is {block_size}; give a power of two from 1 to 256")
    if num_blocks * block_size >= 2**31:
        raise InvalidArgument(f"num_blocks is {num_blocks} blocks of {block_size}; give less than 2^31 positions in all")


def check_positive(name: str, value: object) -> None:
    whole = type(value) is int or isinstance(value, np.integer)  # a bool is none
    if not whole or value < 1:
        raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least 1")


def check_array(name: str, array: object, axes: int = 1) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != axes:
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise InvalidArgument(f"{name} is {got}; give a NumPy array of int32 with {('one axis', 'two axes')[axes - 1]}")


def check_indptr(name: str, array: np.ndarray, num_sequences: int) -> None:
    check_array(name, array)
    if array.size != num_sequences + 1:
        raise InvalidArgument(f"{name} has {array.size} entries; give {num_sequences + 1}, one more than seq_lens")
    if array[0] != 0:
        raise InvalidArgument(f"{name} begins with {array[0]}; let it begin with 0")


def refuse(name: str, wrong: np.ndarray, got: np.ndarray, expected: str) -> None:
    """InvalidArgument about the first sequence that is wrong."""
    b = wrong.argmax()
    raise InvalidArgument(f"{name} gives sequence {b} {got[b]}; give {expected}")


def check_rows(q_indptr, seq_lens, causal: bool) -> np.ndarray:
    """Tokens of q of each sequence, int64 [num_sequences]."""
    check_array("seq_lens", seq_lens)
    check_indptr("q_indptr", q_indptr, seq_lens.size)
    tokens = np.subtract(q_indptr[1:], q_indptr[:-1], dtype=np.int64)
    if tokens.min(initial=0) < 0:
        refuse("q_indptr", tokens < 0, tokens, "an array that never falls")
    if seq_lens.min(initial=0) < 0:
        refuse("seq_lens", seq_lens < 0, seq_lens, "lengths of at least 0")
    if causal and (seq_lens - tokens).min(initial=0) < 0:  # so it is with padding, too: rows of a sequence that is empty
        wrong = (tokens > seq_lens) & (seq_lens > 0)
        if wrong.any():
            refuse("q_indptr", wrong, tokens, "no more rows than the sequence has tokens")
    return tokens


def check_pages(seq_lens, page_indptr, page_indices, block_size: int, num_blocks: int, valid_lengths) -> PageTable:
    """The page tables of sequences whose lengths `check_rows` has seen."""
    if page_indptr is None:
        check_array("page_indices", page_indices, axes=2)
        if page_indices.shape[0] != seq_lens.size:
            raise InvalidArgument(f"page_indices has {page_indices.shape[0]} rows; give {seq_lens.size}, one a sequence")
        most = page_indices.shape[1]
        begin = np.arange(seq_lens.size) * most
        pages = np.full(seq_lens.size, most)
        what, cause = "page_indices", "as many columns as hold every block_size tokens of seq_lens"
    else:
        check_indptr("page_indptr", page_indptr, seq_lens.size)
        begin = page_indptr[:-1]
        pages = np.subtract(page_indptr[1:], begin, dtype=np.int64)
        what, cause = "page_indptr", "a page for every block_size tokens of seq_lens"
        if page_indices is not None:
            check_array("page_indices", page_indices)
            if page_indptr[-1] > page_indices.size:
                raise InvalidArgument(
                    f"page_indices has {page_indices.size} entries; give the {page_indptr[-1]} of page_indptr"
                )
    if page_indices is not None and not page_indices.flags.c_contiguous:
        raise InvalidArgument(f"page_indices has strides {page_indices.strides}; give a C-contiguous array")
    if valid_lengths is not None:
        return _expanded(seq_lens, begin, pages, page_indptr, page_indices, block_size, num_blocks, valid_lengths)
    if (pages * block_size - seq_lens).min(initial=0) < 0:
        refuse(what, pages * block_size < seq_lens, pages, cause)
    if page_indices is not None and page_indices.view(np.uint32).max(initial=0) >= num_blocks:  # or negative; else all is well
        needed = -(-seq_lens.astype(np.int64) // block_size)
        _check_ids(page_indices.reshape(-1)[_ranges(begin, needed)], num_blocks)
    num_entries = page_indices.size if page_indptr is None else int(page_indptr[-1])
    return PageTable(begin, page_indptr, page_indices, block_size, num_blocks, num_entries)


def _check_ids(pages: np.ndarray, num_blocks: int) -> None:
    wrong = pages.view(np.uint32) >= num_blocks
    if wrong.any():
        page = pages[wrong.argmax()]
        raise InvalidArgument(f"page_indices holds block {page}; give ids from 0 to {num_blocks - 1}, below num_blocks")


def _ranges(begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """begin[0] .. begin[0] + count[0] - 1, begin[1] .. and so on."""
    return np.arange(count.sum()) + (begin - (count.cumsum() - count)).repeat(count)


def _expanded(seq_lens, begin, pages, page_indptr, page_indices, block_size, num_blocks, valid_lengths) -> PageTable:
    """Tables of pages of one position each: those that pages of so many valid tokens hold."""
    table = page_indices if page_indptr is None else page_indptr
    axes, size = (2, page_indices.size) if page_indptr is None else (1, int(table[-1]))
    check_array("block_valid_lengths", valid_lengths, axes)
    fits = valid_lengths.shape == page_indices.shape if page_indptr is None else valid_lengths.size >= size
    if not fits:
        expected = f"{page_indices.shape}, as of page_indices" if page_indptr is None else f"the {size} entries of page_indptr"
        raise InvalidArgument(f"block_valid_lengths has shape {valid_lengths.shape}; give {expected}")
    if (pages < 0).any():
        refuse("page_indptr", pages < 0, pages, "an array that never falls")
    valid = valid_lengths.reshape(-1)[:size].astype(np.int64)
    if valid.view(np.uint64).max(initial=0) > block_size:
        wrong = valid[(valid.view(np.uint64) > block_size).argmax()]
        raise InvalidArgument(f"block_valid_lengths holds {wrong}; give lengths from 0 to {block_size}, the block_size")
    end = np.concatenate(([0], valid.cumsum()))
    lengths = end[begin + pages] - end[begin]
    wrong = lengths != seq_lens
    if wrong.any():
        refuse("seq_lens", wrong, seq_lens, f"the sum of its block_valid_lengths, {lengths[wrong.argmax()]}")
    entry = np.arange(size).repeat(valid)
    slot = np.arange(entry.size) - end[:-1].repeat(valid)
    indices = None
    if page_indices is not None:
        blocks = page_indices.reshape(-1)[entry]
        _check_ids(blocks, num_blocks)
        indices = (blocks * block_size + slot).astype(np.int32)
    indptr = np.concatenate(([0], seq_lens.cumsum())).astype(np.int32)
    return PageTable(indptr[:-1], indptr, indices, 1, num_blocks * block_size, size, np.stack((entry, slot), axis=1))


def check_mask(mask_indptr, tokens: np.ndarray, seq_lens) -> tuple[np.ndarray, np.ndarray]:
    """(first word, words of a token's row) of each sequence, both [num_sequences]."""
    check_indptr("mask_indptr", mask_indptr, seq_lens.size)
    words = (seq_lens + np.int64(31)) >> 5
    size = np.subtract(mask_indptr[1:], mask_indptr[:-1], dtype=np.int64)
    wrong = size < words * tokens
    if wrong.any():
        expected = words[wrong.argmax()] * tokens[wrong.argmax()]
        refuse("mask_indptr", wrong, size, f"it {expected} words, ceil(seq_len / 32) for each of its rows")
    return mask_indptr[:-1], words


def check_grid(name: str, grid) -> None:
    """Numbers that a plan can be made with."""
    for field in ("num_ctas", "tile_rows", "step", "decode_cost", "prefill_cost", "item_cost"):
        check_positive(f"{name}.{field}", getattr(grid, field))
    if grid.step & (grid.step - 1) or grid.step > 1024:
        raise InvalidArgument(f"{name}.step is {grid.step}; give a power of two up to 1024")
    if grid.kernel not in ("sm80", "sm90"):
        raise InvalidArgument(f"{name}.kernel is {grid.kernel!r}; give 'sm80' or 'sm90'")
