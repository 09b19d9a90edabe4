"""The PEP 517 build backend: maturin, once Rust is known to be there.

Without this look maturin either fetches a Rust toolchain behind the user's back or ends in a long traceback. Here a
missing or outdated Rust is one message that says what to do. Every hook looks first, because the front end (pip, uv,
build) decides which hook comes first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

# The same version stands in Cargo.toml (rust-version); tests/unit/test_build_backend.py holds the two together.
MINIMUM_RUST: Final = (1, 88)

ConfigSettings = dict[str, Any] | None

# Should a hook of maturin be reached without Rust after all, it must fail rather than install a toolchain.
os.environ["MATURIN_NO_INSTALL_RUST"] = "1"


def missing_rust() -> str | None:
    """Say what is wrong with the Rust on PATH; None if it will do."""
    for variable, name in (("CARGO", "cargo"), ("RUSTC", "rustc")):
        tool = shutil.which(os.environ.get(variable) or name)
        if tool is None:
            return f"`{name}` was not found on PATH."
        try:
            said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            return f"`{tool} --version` failed ({_reason(error)})."
        version = re.search(r"(\d+)\.(\d+)\.\d+\S*", said)
        if version is None:
            return f"`{tool} --version` said {said.strip()!r}, which is no version."
        if (int(version[1]), int(version[2])) < MINIMUM_RUST:
            return f"`{tool}` is version {version[0]}, which is too old."
    return None


def _reason(error: Exception) -> str:
    """The last line of what the tool itself said, else what Python says."""
    said = (getattr(error, "stderr", None) or "").strip()
    return said.splitlines()[-1] if said else str(error)


def _advice() -> str:
    """How to get Rust, and, if it is there but not on PATH, how to put it there."""
    wanted = ".".join(map(str, MINIMUM_RUST))
    lines = [f"shadowkvm is compiled from source and needs Rust {wanted} or newer. Get it by one of:"]
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo") / "bin"
    if shutil.which("cargo") is None and shutil.which("cargo", path=str(home)):
        lines.append(f'  * It is in {home}, but that is not on PATH:  export PATH="{home}:$PATH"')
    lines += [
        "  * rustup, on any system: https://rustup.rs (then open a new shell); if you have it: rustup update stable",
        f"  * your distribution's packages, if they are {wanted} or newer: apt install cargo, dnf install cargo,",
        "    pacman -S rust, apk add cargo, brew install rust",
        "Then run the same command again.",
    ]
    return "\n".join(lines)


def require_rust() -> None:
    """Stop with a message (no traceback: SystemExit with a text) unless there is a Rust that can build this package."""
    problem = missing_rust()
    if problem is not None:
        sys.exit(f"\nRust is missing or too old: {problem}\n{_advice()}\n")


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """PEP 517. Maturin's own answer would add a package that installs a toolchain."""
    del config_settings
    require_rust()
    return []


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """PEP 660."""
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    """PEP 517. A source distribution asks cargo which files belong to the workspace."""
    return get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    """PEP 517."""
    return _hook("prepare_metadata_for_build_wheel", metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: ConfigSettings = None) -> str:
    """PEP 660."""
    return _hook("prepare_metadata_for_build_editable", metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """PEP 517."""
    return _hook("build_wheel", wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """PEP 660."""
    return _hook("build_editable", wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
    """PEP 517."""
    return _hook("build_sdist", sdist_directory, config_settings)


def _hook(name: str, *arguments: object) -> str:
    """Call maturin's hook of that name. Maturin is imported late: looking for Rust must not depend on it."""
    require_rust()
    import maturin  # noqa: PLC0415

    result: str = getattr(maturin, name)(*arguments)
    return result
