"""What the studies share."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SLEEPY = """
import os, sys, time
from pathlib import Path
from simulations.study import Step, side_by_side

def sleep(folder):
    (Path(folder) / "pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    side_by_side("study", "steps", sleep, [sys.argv[1]], [Step(lambda: False, str)], 1)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_workers_end_with_a_study_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "sleepy.py"
    script.write_text(SLEEPY)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    study = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=here)
    told = tmp_path / "pid"
    try:
        while not (told.is_file() and told.read_text()):
            assert study.poll() is None
            time.sleep(0.1)
        worker = int(told.read_text())
        assert is_running(worker)
    finally:
        study.send_signal(signal.SIGKILL)
        study.wait()
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker went on for 10 s")
