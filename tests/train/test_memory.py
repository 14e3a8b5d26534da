"""Freed memory stays inside and goes back on leaving, as the kernel counts it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from matpac_fast.train import memory

WORK = """
import resource
import torch
from matpac_fast.train.memory import freed_memory_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def work():
    kept = [torch.ones(2**18) for _ in range(300)] + [torch.ones(10 * 2**20) for _ in range(10)]  # 1 and 40 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start = resident()
with freed_memory_kept(torch.device("cpu")):
    work(), work()
    inside, during = resident() - start, faults()
print(inside, during, resident() - start, faults())
"""
PAGES = (300 + 10 * 40) << 8  # of 4 KiB, that `work` touches


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_freed_is_kept_and_then_given_back():
    said = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True).stdout
    inside, faults_inside, after, faults_after = map(int, said.split())
    assert inside > 0.9 * PAGES  # though nothing is in use
    assert faults_inside < 0.1 * PAGES
    assert after < 0.2 * PAGES
    assert faults_after > 0.3 * PAGES


@pytest.mark.parametrize(("device", "found"), [("cpu", None), ("cuda", print)], ids=["no glibc", "on a GPU"])
def test_elsewhere_nothing_is_set(monkeypatch, device, found):
    called = []
    monkeypatch.setattr(memory, "_glibc", lambda name: found and (lambda *given: called.append((name, given))))
    with memory.freed_memory_kept(torch.device(device)):
        pass
    assert called == []
