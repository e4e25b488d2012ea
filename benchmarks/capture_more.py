"""The parts of `benchmarks.capture` that compare Megido with itself: without capture, with two workers, over time."""

import argparse
import contextlib
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import uvloop

from benchmarks.capture import Target, load, measure, started
from benchmarks.memory import MB, Watch
from benchmarks.report import ratio, say

LEAN = (("http", 16), ("https", 16))
WORKERS = ("https", 64)
STEP = 10_000
"""Flows between two samples of memory."""


@dataclass(frozen=True)
class Site:
    """The upstreams, and where the proxies keep their files."""

    directory: Path
    trusted: Path
    ports: dict[str, int]
    tls: ssl.SSLContext


@contextlib.contextmanager
def proxy(name: str, command: list[str], core: int | None) -> Iterator[Target]:
    """A proxy of ours: its first line says where it listens."""
    with started([sys.executable, "-m", *command], core, subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = re.search(rb"proxy on \S+?:(\d+)\b.*metrics on \S+?:(\d+)", process.stdout.readline())
        assert ready is not None, f"{name} did not start"
        yield Target(name, int(ready[1]), process, metrics_port=int(ready[2]))


def capture(directory: Path, trusted: Path, *more: str) -> list[str]:
    command = ["megido_capture", "--data-dir", str(directory), "--listen-port", "0", "--metrics-port", "0"]
    return [*command, "--no-forwarder", "--set", f"ssl_verify_upstream_trusted_ca={trusted}", *more]


def against_lean(
    arguments: argparse.Namespace, site: Site, core: int | None
) -> tuple[dict[str, object], dict[str, object]]:
    """CPU a flow of full capture ÷ that of the same proxy without it, over HTTP and HTTPS; the worse is the figure."""
    lean = ["benchmarks.lean", str(site.directory / "lean"), str(site.trusted)]
    with (
        proxy("megido", capture(site.directory / "full", site.trusted, *arguments.capture_arguments), core) as ours,
        proxy("lean", lean, core) as without,
    ):
        _alternate((ours, without), LEAN, arguments, site)
        ratios = {f"{scheme}_c{clients}": _cpu_ratio(ours, without, (scheme, clients)) for scheme, clients in LEAN}
        detail = {
            f"{s}_c{c}": {t.name: [round(cpu, 3) for cpu in t.cpu_ms[s, c]] for t in (ours, without)} for s, c in LEAN
        }
    return {"cpu_vs_lean": max(ratios.values())}, {"cpu_vs_lean": ratios, "cpu_ms_per_request_lean": detail}


def two_workers(arguments: argparse.Namespace, site: Site) -> tuple[dict[str, object], dict[str, object]]:
    """Requests/s of two workers ÷ one. Nothing is pinned: the client shares the cores with them."""
    with (
        proxy("one", capture(site.directory / "one", site.trusted, *arguments.capture_arguments), None) as one,
        proxy(
            "two", capture(site.directory / "two", site.trusted, "--workers", "2", *arguments.capture_arguments), None
        ) as two,
    ):
        _alternate((two, one), (WORKERS,), arguments, site)
        rates = {target.name: [round(rate) for rate in target.rates[WORKERS]] for target in (one, two)}
    return {"workers2": ratio(two.rates[WORKERS], one.rates[WORKERS])}, {"requests_per_second_workers": rates}


def memory(arguments: argparse.Namespace, site: Site, core: int | None) -> tuple[dict[str, object], dict[str, object]]:
    """What `--flows` flows add to resident memory, half of them over HTTPS, the first tenth left out."""
    with proxy("megido", capture(site.directory / "memory", site.trusted, *arguments.capture_arguments), core) as ours:
        assert ours.process is not None
        watch, scheme = Watch(ours.process.pid), "http"
        watch.take(0)
        while ours.requests < arguments.flows:
            context = site.tls if scheme == "https" else None
            uvloop.run(load(ours, site.ports[scheme], context, 16, arguments.seconds))
            watch.take(ours.requests)
            scheme = "https" if scheme == "http" else "http"
            say(f"  {ours.requests:,} flows, {watch.samples[-1].rss / MB:.1f} MB")
    return {"rss_slope_mb_per_10k": watch.slope_mb(STEP)}, {"memory": watch.detail(), "memory_flows": ours.requests}


def _alternate(
    targets: tuple[Target, Target],
    keys: tuple[tuple[str, int], ...],
    arguments: argparse.Namespace,
    site: Site,
) -> None:
    for key in keys:
        for target in targets:
            uvloop.run(load(target, site.ports[key[0]], site.tls if key[0] == "https" else None, key[1], 1.0))
        for number in range(arguments.rounds):
            for target in targets if number % 2 == 0 else targets[::-1]:
                measure(target, key, site.ports, site.tls, arguments.seconds)


def _cpu_ratio(ours: Target, theirs: Target, key: tuple[str, int]) -> float:
    return round(median(ours.cpu_ms[key]) / median(theirs.cpu_ms[key]), 3)
