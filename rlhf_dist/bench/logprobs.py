"""`rlhf-dist bench logprobs`: peak memory of log-probabilities over a large vocabulary.

Each measurement is a process of its own: it makes logits and labels, notes what it holds, and then reads the
kernel's high-water mark of its resident memory after the forward and after the backward pass. So libraries'
own buffers count. Freed memory goes back to the kernel at once in these processes, so that what an allocator
would keep for later does not: the figures are of memory in use.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from rlhf_dist.ops.logprobs import CHUNK_BYTES, logprobs_from_logits

Method = Literal["chunked", "plain"]
"""`ops.logprobs`, or `log_softmax` of the logits in float32."""

DTypeName = Literal["bfloat16", "float32"]
METHODS: tuple[Method, ...] = ("chunked", "plain")
DTYPES: tuple[DTypeName, ...] = ("bfloat16", "float32")
FILL_ROWS = 64
"""Rows of logits that are drawn at a time: drawing leaves no peak of its own."""
M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: larger allocations are mapped, and unmapped when they are freed."""
MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Peak memory of one way to compute log-probabilities [N] of logits [N, V]."""

    method: Method
    dtype: DTypeName
    logits_bytes: int
    """Of the logits; their gradient has as many."""
    forward_bytes: int
    """At most during the forward pass, beside logits and labels."""
    backward_bytes: int
    """At most during forward and backward pass, beside logits and labels, the gradient included."""

    @property
    def work_bytes(self) -> int:
        """At most, beside the logits and, in the backward pass, their gradient."""
        return max(self.forward_bytes, self.backward_bytes - self.logits_bytes)


def peak_bytes(method: Method, *, num_tokens: int, vocab_size: int, dtype: DTypeName) -> Peak:
    """Measure in a new process. It takes memory for about twice the logits, `plain` for several more."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, method, num_tokens, vocab_size, dtype).result()


def peaks(*, num_tokens: int, vocab_size: int) -> Iterator[Peak]:
    """Every method on logits of every dtype."""
    for dtype in DTYPES:
        for method in METHODS:
            yield peak_bytes(method, num_tokens=num_tokens, vocab_size=vocab_size, dtype=dtype)


def print_peaks(console: Console, *, num_tokens: int = 4096, vocab_size: int = 150_000) -> None:
    """Measure everything and print it as a table."""
    table = Table(title=f"{num_tokens} tokens, vocabulary of {vocab_size}; MiB")
    for column in ("method", "logits", "size", "forward", "forward + backward", "beside logits, gradient"):
        table.add_column(column, justify="left" if column in ("method", "logits") else "right")
    for peak in peaks(num_tokens=num_tokens, vocab_size=vocab_size):
        sizes = (peak.logits_bytes, peak.forward_bytes, peak.backward_bytes, peak.work_bytes)
        table.add_row(peak.method, peak.dtype, *(f"{size / MIB:,.0f}" for size in sizes))
    console.print(table)
    console.print(f"chunked: at most {CHUNK_BYTES / MIB:.0f} MiB beside logits and gradient, by design")


def _measure(method: Method, num_tokens: int, vocab_size: int, dtype: DTypeName) -> Peak:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    _logprobs(method, *_example(2, 8, dtype)).sum().backward()  # what libraries set up once
    logits, labels = _example(num_tokens, vocab_size, dtype)
    held = _memory("VmRSS")
    logprobs = _logprobs(method, logits, labels)
    forward = _memory("VmHWM")
    logprobs.sum().backward()
    return Peak(method, dtype, logits.numel() * logits.itemsize, forward - held, _memory("VmHWM") - held)


def _example(num_tokens: int, vocab_size: int, dtype: DTypeName) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(num_tokens, vocab_size, dtype=getattr(torch, dtype))  # [N, V]
    for rows in logits.split(FILL_ROWS):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)  # [N]
    return logits.requires_grad_(), labels


def _logprobs(method: Method, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N]"""
    if method == "chunked":
        return logprobs_from_logits(logits, labels)
    return logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def _memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """This process's resident memory in bytes, now or at its highest."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}; Linux has")
