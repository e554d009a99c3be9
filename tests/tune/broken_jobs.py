"""What a worker holds in tests of workers that hang, die or raise."""

import os
import signal
import subprocess
import sys
import time


class Jobs:
    def double(self, number, note):
        note("double")
        return 2 * number

    def hang(self, note):
        note("about to hang")
        time.sleep(1000)

    def hang_with_child(self, path, note):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        path.write_text(str(child.pid))
        time.sleep(1000)

    def segfault(self, note):
        note("about to segfault")
        signal.raise_signal(signal.SIGSEGV)

    def leave(self, note):
        os._exit(3)

    def fail(self, note):
        raise ValueError("an illegal memory access was encountered")

    def take_long_but_talk(self, note):
        for step in range(4):
            note(f"step {step}")
            time.sleep(0.3)
        return "done"

    def pid(self, note):
        return os.getpid()


class Unmakeable:
    def __init__(self):
        raise RuntimeError("no device here")
