"""Programs that stand for what a test machine lacks: apptainer, Slurm's container plugin, environment modules, conda.

Each writes down how it was called and then runs what it was given, so that the rest is the real thing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from tests.slurm.cluster import SEARCH_PATH

APPTAINER = """\
#!/usr/bin/env bash
[ "$1" = exec ] || exit 64
echo "$SLURM_PROCID $*" >>{record}
while [ "${{1%.sif}}" = "$1" ]; do shift; done
shift
INSIDE=apptainer exec "$@"
"""
# srun as it is with the pyxis plugin, whose options the real one here does not know.
PYXIS = """\
#!/usr/bin/env bash
echo "$*" >>{record}
words=()
for word in "$@"; do
  case $word in
    --container-*) export INSIDE=pyxis ;;
    *) words+=("$word") ;;
  esac
done
exec {srun} "${{words[@]}}"
"""
# Both read a variable that nobody has set, as the real ones do.
MODULES = """\
module() {{ [ "$LMOD_QUIET" != yes ]; echo "module $*" >>{record}; }}
conda() {{
  echo "conda $*" >>{record}
  PS1="($2) $PS1"
  export PATH={programs}:$PATH
}}
"""
# The nodes are one machine, whose other load would make one of them slow: what is measured takes as long on each.
EQUALLY_FAST = """
import itertools, sys, time
if "pretrain.cluster.health" in sys.orig_argv:
    seconds = itertools.count()
    time.perf_counter = lambda: float(next(seconds))
"""


def _program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return file


def make_apptainer(folder: Path) -> Path:
    """`bin/apptainer` in `folder`; returns the file that gets a line of its rank and arguments for each call."""
    record = folder / "apptainer.txt"
    _program(folder / "bin" / "apptainer", APPTAINER.format(record=record))
    return record


def make_pyxis(folder: Path) -> Path:
    """`bin/srun` in `folder`, which knows the options of pyxis; returns the file that gets a line of its arguments for
    each call.
    """
    record = folder / "srun.txt"
    srun = shutil.which("srun", path=SEARCH_PATH)
    _program(folder / "bin" / "srun", PYXIS.format(record=record, srun=srun))
    return record


def make_modules(folder: Path, record: Path) -> Path:
    """A shell file that defines `module` and `conda`; only `conda activate` makes `python` known."""
    _program(folder / "programs" / "python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    return _program(folder / "modules.sh", MODULES.format(record=record, programs=folder / "programs"))


def start_python_with(folder: Path, lines: str) -> str:
    """A PYTHONPATH with which every Python starts with these lines; `folder` is made for them."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(lines, encoding="utf-8")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
