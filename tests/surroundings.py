"""What a process inherits from whoever starts it, made the same everywhere, so that no test depends on it."""

from __future__ import annotations

import os
import signal

from pretrain.ranks.environment import clean_environment

# How wide and colourful a terminal is wanted, whether anything may be asked for over the network, what jobs should be
# like: tests that want one of these set it themselves.
_NAMES = {
    "CLICOLOR_FORCE",
    "COLUMNS",
    "FORCE_COLOR",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "LINES",
    "NO_COLOR",
    "PYTHONWARNINGS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
}
_PREFIXES = ("MOR_", "SBATCH_", "WANDB_")
_KEPT = ("MOR_REQUIRE_ALL", "MOR_SHARED_DATA")
# How MPI is to run on this machine, unlike the place that a launcher gave to this process.
_MACHINES = ("OMPI_ALLOW_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")
# Ignored by what a shell starts in the background, by nohup, and by some supervisors; and inherited by every child.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCHLD")


def normalize() -> None:
    """Give this process, and what it starts from now on, the variables, signals and file mode of a plain shell."""
    own = clean_environment()
    for name in list(os.environ):
        placed = name not in own and not name.startswith(_MACHINES)
        if placed or name in _NAMES or (name.startswith(_PREFIXES) and name not in _KEPT):
            del os.environ[name]
    # Servers of the tests are on this machine.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    for number in (getattr(signal, name) for name in _SIGNALS):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
