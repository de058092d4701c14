"""The command line as a process: a terminal, a closed pipe, an interrupt."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import latentguard
from cli.tiny_files import rows, written


class TestProcess:
    """What only a process of its own can show."""

    RUN = (sys.executable, "-c", "from latentguard.cli import main; main()")
    ENV = os.environ | {
        "PYTHONPATH": str(Path(latentguard.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
    }

    def test_a_terminal_shows_the_bar_and_the_file_gets_the_verdicts(self, guard, files):
        """``latentguard score G F > verdicts.jsonl``, typed by a person."""
        ours, theirs = pty.openpty()
        words = [*self.RUN, "score", guard, files["asked"]]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=theirs, env=self.ENV, check=True
        )
        os.close(theirs)
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()][-1] == "kind-8"
        assert len(done.stdout.splitlines()) == 18
        assert b"score" in os.read(ours, 1 << 16)
        os.close(ours)

    def test_an_error(self, tmp_path):
        words = [*self.RUN, "show", tmp_path / "none"]
        done = subprocess.run(words, capture_output=True, text=True, env=self.ENV, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: ")
        assert len(done.stderr.splitlines()) == 1

    def test_a_reader_that_leaves(self, guard, files, tmp_path):
        """``latentguard score G F | head -1``."""
        many = written(tmp_path / "many.jsonl", rows(400, "kind"))
        words = [*self.RUN, "score", guard, many]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.ENV
        ) as process:
            process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
        assert b"Traceback" not in err
        assert b"Exception ignored" not in err
        assert process.returncode == 1

    def test_a_person_who_interrupts(self, guard, tmp_path):
        """Control-C while standard input is awaited."""
        heeding = ["env", "--default-signal=INT"]  # a job in the background ignores it
        words = [*heeding, *self.RUN, "score", guard, "-", "--out", tmp_path / "v.jsonl"]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=self.ENV
        ) as process:
            while not process.stderr.readline().startswith(b"Loading"):
                assert process.poll() is None
            while not (tmp_path / "v.jsonl.partial.guard").exists():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            err = process.stderr.read()
        assert b"Traceback" not in err
        assert b"Interrupted. " in err
        assert process.returncode == 130
