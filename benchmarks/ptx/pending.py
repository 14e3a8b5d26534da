"""What is under way beside a thread: asynchronous copies and matrix products."""

from __future__ import annotations

import numpy as np

from .memory import Fault, Threads


class Pending:
    """Asynchronous copies and matrix products: begun, committed in groups, and there when a group is waited for."""

    def __init__(self, n: int):
        self.threads = n
        self.copies: list[tuple[np.ndarray, Threads, np.ndarray, np.ndarray]] = []
        self.committed = np.zeros(n, np.int64)
        self.loads: list[frozenset[str]] = []  # from tensor memory: the registers that they write
        self.products: list[tuple[np.ndarray, Threads, np.ndarray, frozenset[str], frozenset[str]]] = []
        self.product_groups = np.zeros(n, np.int64)

    # copies: (the group of each thread, threads, (n,) places in shared memory, (n, bytes) what comes there)

    def copy(self, who: Threads, place: np.ndarray, data: np.ndarray) -> None:
        self.copies.append((self.committed[who].copy(), who, place, data))

    def commit_copies(self, who: Threads) -> None:
        self.committed[who] += 1

    def wait_copies(self, who: Threads, left: int) -> list[tuple[Threads, np.ndarray, np.ndarray]]:
        """What has come for these threads when all but their last `left` groups are waited for."""
        come, rest = [], []
        waits = np.zeros(self.threads, bool)
        waits[who] = True
        for group, threads, place, data in self.copies:
            here = waits[threads] & (group < self.committed[threads] - left)
            if here.any():
                come.append((threads[here], place[here], data[here]))
            if not here.all():
                rest.append((group[~here], threads[~here], place[~here], data[~here]))
        self.copies = rest
        return come

    # products: (the group of each thread, threads, granules of shared memory and registers that they read, registers
    # that they write)

    def product(self, who: Threads, cells: np.ndarray, held: tuple[str, ...], into: tuple[str, ...]) -> None:
        self.products.append((self.product_groups[who].copy(), who, cells, frozenset(held), frozenset(into)))

    def commit_products(self, who: Threads) -> None:
        self.product_groups[who] += 1

    def wait_products(self, who: Threads, left: int) -> None:
        waits = np.zeros(self.threads, bool)
        waits[who] = True
        rest = []
        for group, threads, *what in self.products:
            there = ~(waits[threads] & (group < self.product_groups[threads] - left))
            if there.any():
                rest.append((group[there], threads[there], *what))
        self.products = rest

    def check_write(self, cells: np.ndarray) -> None:
        """Granules of shared memory that are about to be written."""
        for _, _, reads, _, _ in self.products:
            if np.isin(cells, reads).any():
                raise Fault("shared memory is written that a product under way reads: wgmma.wait_group is missing")

    def rename(self, read: frozenset[str], written: frozenset[str]) -> bool:
        """Whether registers that a product is to write get other names: Triton does so before it waits, and ptxas makes
        nothing of it."""
        found = False
        for i, loaded in enumerate(self.loads):
            if read and read <= loaded:
                self.loads[i], found = loaded | written, True
        for i, (group, who, cells, held, into) in enumerate(self.products):
            if read and read <= into:
                self.products[i] = (group, who, cells, held, into | written)
                found = True
        return found

    def check_registers(self, written: frozenset[str], read: frozenset[str]) -> None:
        if any(not loaded.isdisjoint(written | read) for loaded in self.loads):
            raise Fault("registers are used before they are loaded: tcgen05.wait::ld is missing")
        for _, _, _, held, into in self.products:
            if not (written.isdisjoint(held | into) and read.isdisjoint(into)):
                raise Fault("the registers of a product under way are used: wgmma.wait_group is missing")
