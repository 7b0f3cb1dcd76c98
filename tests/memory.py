"""Peak memory of a process of its own, measured by the operating system."""

import subprocess
import sys

import pytest

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

_STATUS = """
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
"""
_MARK = """
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # reset the high-water mark
before = status("VmRSS")
"""


def peak_mb(setup: str, measured: str, *arguments: object) -> float:
    """What the script `measured` needs at its peak above what `setup` left and the bytes of `kept`, which it sets.

    `arguments` are the script's ``sys.argv[1:]``. `setup` should call what is measured once, on small inputs: libraries and
    thread pools allocate on first use.
    """
    script = _STATUS + setup + _MARK + measured + '\nprint(status("VmHWM") - before - kept)'
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout) / 1e6
