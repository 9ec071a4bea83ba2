"""Machine: Python and packages, the device that learns, and room on the disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from recsys.cli.doctor.finding import Finding
from recsys.settings import Settings

MIN_FREE_BYTES = 1 << 30
# An append-only file is written anew beside the old one.
COPIES = 2
GIB = 1 << 30


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at what this machine offers."""
    yield from packages(metadata.requires("recsys") or [])
    yield from _device(settings)
    yield from _disk(settings)


def packages(requirements: list[str]) -> Iterator[Finding]:
    """Compare what is installed with what is required, extras apart."""
    wrong = []
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        name, bounds = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*).*", requirement).groups()  # type: ignore[union-attr]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if not _satisfies(version, bounds):
            wrong.append(f"{name} is {version}, {bounds.strip()} is needed")
    python = f"Python {platform.python_version()}, torch {torch.__version__}, recsys {metadata.version('recsys')}"
    if wrong:
        yield Finding("packages", "problem", f"{python}; {'; '.join(wrong)}", "pip install --upgrade recsys")
    else:
        yield Finding("packages", "ok", f"{python}; all that is required is there")


def _satisfies(version: str, bounds: str) -> bool:
    """Check the two kinds of bounds that we use, >= and <."""
    tests = {">=": tuple.__ge__, "<": tuple.__lt__}
    found = re.findall(r"(>=|<)\s*([\d.]+)", bounds)
    return all(tests[sign](_numbers(version), _numbers(bound)) for sign, bound in found)


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _device(settings: Settings) -> Iterator[Finding]:
    if settings.device == "cpu":
        yield Finding("device", "ok", "the CPU, as device says")
        return
    if torch.cuda.is_available():
        yield _cuda()
        return
    why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no usable CUDA device"
    if settings.device == "cuda":
        advice = "install a driver and a torch with CUDA that fit each other, or set device = auto"
        yield Finding("device", "problem", f"device = cuda, and {why}", advice)
    elif Path("/proc/driver/nvidia/version").exists():
        advice = "install a torch with CUDA to use it, or set device = cpu"
        yield Finding("device", "warning", f"there is an NVIDIA GPU, but {why}: the CPU is used", advice)
    else:
        yield Finding("device", "ok", f"the CPU: {why}")


def _cuda() -> Finding:
    name = torch.cuda.get_device_name(0)
    try:
        # Synchronises with the GPU: that it computes is what is to be seen.
        total = float(torch.ones(8, device="cuda").sum())
        free, all_ = torch.cuda.mem_get_info(0)
    except RuntimeError as error:
        advice = "restart what holds the GPU, check the driver (nvidia-smi), or set device = cpu"
        return Finding("device", "problem", f"{name} does not compute: {str(error).splitlines()[0]}", advice)
    right = total == 8.0
    found = f"{name}, {free / GIB:.0f} of {all_ / GIB:.0f} GiB free" + ("" if right else ", and it computes wrongly")
    return Finding("device", "ok" if right else "problem", found, "" if right else "set device = cpu")


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir.resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("disk", "problem", f"{there} takes no files of ours", "correct its rights, or give --data-dir")
        return
    free = shutil.disk_usage(there).free
    wanted = COPIES * (settings.log_max_bytes + settings.weights_max_bytes)
    found = f"{free / GIB:.1f} GiB free at {folder}, where `up` and `demo` keep their store"
    if free < MIN_FREE_BYTES:
        yield Finding("disk", "problem", found, "make room: a store with a full disk refuses feedback")
    elif free < wanted:
        advice = (
            f"log and weights may grow to {wanted / COPIES / GIB:.0f} GiB, twice that while the store rewrites its "
            "file; make room, or lower log_max_bytes and weights_max_bytes"
        )
        yield Finding("disk", "warning", found, advice)
    else:
        yield Finding("disk", "ok", found)
