"""Download wheels for a GPU machine without a package index, in parcels small enough to be sent one by one.

    python tests/gpu/carry.py --into wheels --has there.txt [--parcel-mib 60] [--without-unsloth]

`there.txt` is the output of `pip list --format=freeze` on that machine. A package that it has in the locked version, or
newer, is not downloaded; torch, triton and nvidia's packages always stay the machine's own. All other packages that the
gpu extra locks, and pytest, are downloaded for x86-64 Linux, without the files that a CUDA 13 machine does not load.
Our own loop needs no Unsloth; trl is for the benchmark's arms `plain` and `earlier`. On that
machine, install each parcel with
`pip install --no-index --no-deps --target SITE wheels/1/*.whl`, and put SITE on PYTHONPATH. Needs uv and pip here.
"""

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

_NEVER = re.compile(r"^(nvidia-|cuda-|torch$|torchvision$|triton$|xformers$|llamarefine$)")
# What the tests need beside the gpu extra, with their dependencies.
_TESTS = ("pytest", "iniconfig", "pluggy", "pygments", "packaging", "trl")
_UNSLOTH = re.compile(r"^(unsloth|unsloth-zoo|bitsandbytes|torchao|diffusers|hf-transfer|cut-cross-entropy|tyro)$")
# botocore loads a service's description when a client for it is made; our store makes clients of these two only.
_AWS_SERVICES = ("s3", "sts")


def _unused_in_botocore(name: str) -> bool:
    """Whether a file describes a service that we do not call. Files directly in data/ are for all services."""
    found = re.match(r"botocore/data/([^/]+)/", name)
    return found is not None and found[1] not in _AWS_SERVICES


# Files of a wheel that a CUDA 13 machine never opens: kernels of other CUDA versions, a browser application.
_UNUSED: dict[str, Callable[[str], bool]] = {
    "bitsandbytes": lambda name: name.endswith(".so") and "cuda13" not in name and "cpu" not in name,
    "botocore": _unused_in_botocore,
    "unsloth": lambda name: name.startswith(("studio/", "unsloth_cli/")),
}
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def main() -> None:
    options = _options()
    installed = _versions(options.has.read_text().splitlines())
    wanted = {
        name: pin
        for name, pin in locked().items()
        if not _NEVER.match(name)
        and not (options.without_unsloth and _UNSLOTH.match(name))
        and _number(installed.get(name, "")) < _number(pin.partition("==")[2])
    }
    options.into.mkdir(parents=True)
    download(sorted(wanted.values()), options.into, options.python)
    for wheel in sorted(options.into.glob("*.whl"), key=lambda path: -path.stat().st_size):
        before = wheel.stat().st_size
        remove_unused_files(wheel)
        after = wheel.stat().st_size
        print(f"{after / 2**20:7.2f} MiB {wheel.name}" + (f", of {before / 2**20:.2f}" if after < before else ""))
    for number, parcel in enumerate(parcels(list(options.into.glob("*.whl")), options.parcel_mib * 2**20), 1):
        folder = options.into / str(number)
        folder.mkdir()
        for wheel in parcel:
            shutil.move(wheel, folder)
        print(f"{folder}: {len(parcel)} wheels, {sum(file.stat().st_size for file in folder.iterdir()) >> 20} MiB")


def locked() -> dict[str, str]:
    """Return the lock file's pins of the gpu extra and of what the tests need, by package."""
    found = _exported("--no-dev", "--extra", "gpu")
    everything = _exported("--all-groups", "--extra", "gpu")
    return found | {name: everything[name] for name in _TESTS}


def _exported(*options: str) -> dict[str, str]:
    command = [
        "uv",
        "export",
        "--quiet",
        "--locked",
        *options,
        "--no-hashes",
        "--no-header",
        "--no-annotate",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pins = [line.split(";")[0].strip() for line in lines if "==" in line and "win32" not in line]
    return dict(zip((_name(pin) for pin in pins), pins, strict=True))


def download(pins: list[str], into: Path, python: str) -> None:
    """Download the wheel of each pin for that machine; report each package that has none."""
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--no-deps", "-q"]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    for pin in pins:
        command = [sys.executable, "-m", "pip", "download", *target, *platforms, "-d", str(into), pin]
        if subprocess.run(command, check=False).returncode:
            print(f"no wheel for {pin}", file=sys.stderr)


def remove_unused_files(wheel: Path) -> None:
    """Rewrite `wheel` without its unused files and their lines in RECORD."""
    unused = _UNUSED.get(_name(wheel.name.split("-")[0]))
    if unused is None:
        return
    light = wheel.with_suffix(".light")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(light, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if unused(item.filename):
                continue
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not unused(line.split(",")[0])).encode()
            new.writestr(item, content)
    light.replace(wheel)


def parcels(wheels: list[Path], limit_bytes: int) -> list[list[Path]]:
    """Put the wheels, largest first, into the first parcel with room; a wheel above the limit gets its own parcel."""
    filled: list[tuple[int, list[Path]]] = []
    for wheel in sorted(wheels, key=lambda path: (-path.stat().st_size, path.name)):
        size = wheel.stat().st_size
        for place, (used, parcel) in enumerate(filled):
            if used + size <= limit_bytes:
                parcel.append(wheel)
                filled[place] = (used + size, parcel)
                break
        else:
            filled.append((size, [wheel]))
    return [parcel for _, parcel in filled]


def _versions(lines: list[str]) -> dict[str, str]:
    """Return the version of each package in the output of `pip list --format=freeze`; none in "name @ url"."""
    return {_name(line): line.strip().partition("==")[2] for line in lines if line.strip() and not line.startswith("#")}


def _number(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, to compare; of no version, the smallest."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z]", version)[0])))


def _name(pin: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>@ \[;]", pin.strip())[0]).lower()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, required=True, help="a new folder for the parcels")
    parser.add_argument("--has", type=Path, required=True, help="output of `pip list --format=freeze` on that machine")
    parser.add_argument("--parcel-mib", type=int, default=60)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--without-unsloth", action="store_true", help="leave out Unsloth and bitsandbytes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
