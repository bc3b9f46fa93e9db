"""Tensors that end at a page that nobody may read: one element too far ends the process."""

import ctypes
import mmap

import torch


def guarded(t, unreadable=0):
    """A copy of ``t`` that ends at an unreadable page, or whose last ``unreadable`` bytes, whole pages, are that page.

    For child processes.
    """
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = -(-size // page) + (unreadable == 0)
    memory = mmap.mmap(-1, pages * page)
    copy = (
        torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=0 if unreadable else (pages - 1) * page - size)
        .view(t.shape)
        .copy_(t)
    )
    base = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    hidden = unreadable or page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * page - hidden), hidden, 0) == 0
    return copy
