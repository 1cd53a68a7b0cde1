"""``vllm-di new-port NAME``: a package of its own for new hardware, ready to be filled.

What it writes are the files under ``templates/port``: ``NAME`` in a path and ``$name`` in a text
stand for the port's name.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from string import Template

import vllm_di
from vllm_di.commands.arguments import Arguments, UsageError
from vllm_di.components.interfaces import INTERFACE_VERSION
from vllm_di.containers.tree import ConfigFiles, shown
from vllm_di.errors import PortError
from vllm_di.version import __version__

TEMPLATES = Path(vllm_di.__file__).parent / "templates" / "port"
SUFFIX = ".template"

KEPT = frozenset(
    [
        *("cuda", "fpga", "hip", "hpu", "ideep", "ipu", "lazy", "maia", "mkldnn", "mps", "mtia"),
        *("opencl", "opengl", "ort", "ve", "vulkan", "xla", "xpu"),
    ]
)
"""Names of devices that torch keeps for the real ones: a simulated one is called ``sim_NAME``."""

NO_DEVICES = frozenset({"cpu", "meta", "privateuseone"})
"""Names that torch gives to what is no accelerator, or to none in particular."""

LAYOUT = frozenset({"conf", "docs", "tests", "auto", "base"})
"""Names with a meaning of their own, in a port's folder or in a config group."""


def run(arguments: Arguments) -> int:
    """One word: the port's name."""
    if len(arguments.words) != 1 or arguments.overrides:
        raise UsageError("write: vllm-di new-port NAME, e.g. vllm-di new-port acme")
    name = arguments.words[0]
    check_name(name, ConfigFiles.find(arguments.config_dirs))
    folder = Path.cwd() / f"vllm-di-{name.replace('_', '-')}"
    files = write_port(name, folder)
    for file in files:
        print(file.relative_to(folder.parent))
    print(
        f"\n{len(files)} files. Next:\n"
        f"  pip install -e '{folder.name}[test]' && pytest {folder.name}\n"
        f"  vllm-di conform platform={name} device.simulated=true\n"
        f"then read {folder.name}/PORTING.md"
    )
    return 0


def check_name(name: str, tree: ConfigFiles) -> None:
    """Whether a port may be called so. Raises UsageError, or PortError where the name is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"new-port {name!r}: expected a name for a Python package: small letters, digits "
            "and _, a letter first, no keyword"
        )
    if name in sys.stdlib_module_names:
        raise UsageError(f"new-port {name!r}: this is a module of Python's own library")
    if name in LAYOUT:
        raise UsageError(f"new-port {name!r}: the name has a meaning of its own in a port's files")
    if name in NO_DEVICES:
        raise UsageError(f"new-port {name!r}: torch has a device of this name, no accelerator")
    for port in tree.ports:
        if name in (port.name, port.package):
            raise PortError(f"new-port {name!r}: taken by the installed port {port.distribution}")
    for group in ("platform", "device", "ops"):
        if file := tree.options(group).get(name):
            raise PortError(f"new-port {name!r}: there is {group}={name} already ({shown(file)})")
    if util.find_spec(name) is not None:
        raise PortError(f"new-port {name!r}: a package of this name is installed")


def write_port(name: str, folder: Path) -> list[Path]:
    """Fill ``folder``, which must not exist, and return the files. Raises UsageError."""
    values = {
        "name": name,
        "title": "".join(part.capitalize() for part in name.split("_")),
        "distribution": name.replace("_", "-"),
        "simulated": f"sim_{name}" if name in KEPT else name,
        "version": __version__,
        "interface": INTERFACE_VERSION,
    }
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"new-port: {folder} exists already") from None
    written = []
    for template in templates():
        inside = template.relative_to(TEMPLATES).as_posix().removesuffix(SUFFIX)
        path = folder / inside.replace("NAME", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = Template(template.read_text(encoding="utf-8")).substitute(values)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def templates() -> Iterator[Path]:
    """The files that are filled, in name order."""
    return iter(sorted(TEMPLATES.rglob(f"*{SUFFIX}")))
