"""What this machine is: its CPU, the instructions that decide how fast integers are, memory, runtimes."""

import functools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from tinier.targets.base import Status, Target, known_targets

# Flag as the Linux kernel names it → what it gives. The first four multiply 8-bit integers into 32-bit sums.
INSTRUCTIONS = {
    "avx512_vnni": "8-bit dot products, 512 bit wide",
    "avx_vnni": "8-bit dot products, 256 bit wide",
    "amx_int8": "8-bit matrix tiles",
    "asimddp": "8-bit dot products (Arm)",
    "i8mm": "8-bit matrix products (Arm)",
    "avx2": "256-bit vectors",
    "avx512f": "512-bit vectors",
    "avx512_bf16": "bfloat16 dot products",
    "amx_bf16": "bfloat16 matrix tiles",
    "avx512_fp16": "float16 arithmetic",
    "fphp": "float16 arithmetic (Arm)",
    "bf16": "bfloat16 dot products (Arm)",
}
# Other systems' names for the same instructions.
SYNONYMS = {
    "avx512_f": "avx512f",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "feat_dotprod": "asimddp",
    "feat_i8mm": "i8mm",
    "feat_fp16": "fphp",
    "feat_bf16": "bf16",
}
WIDTH = 8  # of the widths that channels are rounded to where nothing says more: 256-bit vectors of float32
EXACT_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Machine:
    """Facts about this machine.

    Attributes:
        cpu: the model's name, as the system gives it.
        architecture: such as x86_64 or arm64.
        system: such as "Linux 6.1".
        cores: physical cores that this process may use.
        logical: logical cores that this process may use.
        memory: bytes of physical memory, or of the container's limit where that is less.
        flags: those of `INSTRUCTIONS` that the CPU has.
        vnni: whether 8-bit products are summed in 32 bits. Without it x86 sums pairs in 16 bits, which saturate.
        python: its version.
        runtimes: every target, installed or not.
    """

    cpu: str
    architecture: str
    system: str
    cores: int
    logical: int
    memory: int
    flags: tuple[str, ...]
    vnni: bool
    python: str
    runtimes: dict[str, Status] = field(default_factory=dict)


@functools.cache
def machine() -> Machine:
    """The facts, read once."""
    flags = _flags()
    architecture = platform.machine() or "unknown"
    arm = architecture.lower() in ("arm64", "aarch64")
    return Machine(
        cpu=_cpu_name(),
        architecture=architecture,
        system=f"{platform.system()} {platform.release()}",
        cores=default_threads(),
        logical=_usable_cores(),
        memory=min(psutil.virtual_memory().total, _memory_limit()),
        flags=tuple(flag for flag in INSTRUCTIONS if flag in flags),
        # Arm without dot products widens to 16 bits before it adds, so it is slower there but does not saturate.
        vnni=arm or any(flag in flags for flag in EXACT_INT8),
        python=platform.python_version(),
        runtimes={name: cls.status() for name, cls in known_targets().items() if cls.package},
    )


def width_for(target: Target | None) -> int:
    """The multiple that channel widths are best rounded to for a runtime on this CPU: what its kernels take at once.

    Args:
        target: the runtime; None for any.

    Returns:
        The largest of the target's ``blocks`` whose instructions the CPU has, at least 8. It is how kernels are built, not a measured time.
    """
    blocks = target.blocks if target is not None else {}
    return max([blocks.get(flag, 0) for flag in machine().flags] + [WIDTH])


def default_threads() -> int:
    """Physical cores that this process may use: its affinity and its container's quota count, hyper-threads do not."""
    logical = _usable_cores()
    all_logical = psutil.cpu_count(logical=True) or logical
    all_physical = psutil.cpu_count(logical=False) or all_logical
    siblings = max(1, round(all_logical / all_physical))
    affinity = _affinity()
    # With only some cores allowed, the siblings among them cannot be told apart everywhere: the topology of Linux can.
    physical = _physical_of(affinity) if affinity else None
    if physical is None:
        physical = max(1, -(-logical // siblings))
    return max(1, min(physical, logical))


def _usable_cores() -> int:
    cores = len(_affinity()) or psutil.cpu_count(logical=True) or 1
    quota = _cpu_quota()
    return max(1, min(cores, int(quota + 0.5))) if quota else cores


def _affinity() -> frozenset[int]:
    """Logical cores that this process may use; empty where the system does not say."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset()


def _physical_of(cores: frozenset[int]) -> int | None:
    groups = set()
    for core in cores:
        text = _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        if not text:
            return None
        groups.add(text)
    return len(groups)


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control group allows; None without a limit."""
    quota, period, *_ = [*_read("/sys/fs/cgroup/cpu.max").split(), "", ""]
    if not quota:
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if not (quota.isdigit() and period.isdigit()) or int(period) == 0:
        return None
    return int(quota) / int(period) or None


def _memory_limit() -> int:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(file)
        if text.isdigit() and int(text) > 0:
            return int(text)
    return sys.maxsize


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    if sys.platform == "darwin":
        return _sysctl("-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine() or "unknown"


def _flags() -> frozenset[str]:
    words: set[str] = set()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            words.update(value.split())
            break
    if not words and sys.platform == "darwin":
        for line in _sysctl("hw.optional").splitlines():
            key, _, value = line.partition(":")
            if value.strip() == "1":
                words.add(key.rsplit(".", 1)[-1])
        words.update(_sysctl("-n", "machdep.cpu.leaf7_features").split())
    if not words:
        words = set(_torch_capabilities())
    lower = {word.lower() for word in words}
    return frozenset(lower | {SYNONYMS[word] for word in lower if word in SYNONYMS})


def _torch_capabilities() -> list[str]:
    """What torch found out about the CPU: the only source on Windows."""
    try:
        found = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        capability = torch.backends.cpu.get_cpu_capability()
        return {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512f"]}.get(capability, [])
    return [name for name, value in found.items() if value is True]


def _sysctl(*arguments: str) -> str:
    command = ["sysctl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(file: str) -> str:
    """A file of the system, or nothing where the system does not have it."""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
