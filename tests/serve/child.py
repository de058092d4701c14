"""Starts the real ``serve`` command on the tiny model, often: imports once, forks for each.

The model is put together here, since its tokenizer exists in memory only. Reads JSON lines:
``{"start": [arguments], "stderr": file, "environment": {}}`` is answered with a process id,
``{"poll": id}`` with the exit code or null.
"""

import json
import os
import sys
import traceback

import torch
import typer

from latentguard.cli.serve.command import serve
from latentguard.errors import LatentGuardError
from latentguard.models.chat_model import ChatModel
from latentguard.serve import server  # noqa: F401 (imported before the fork)
from serve.faulty import Faulty
from serve.running import tiny_model


def start(arguments, stderr, environment):
    """Run the command in a child, as ``latentguard serve`` would."""
    child = os.fork()
    if child:
        return child
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    os.environ.update(environment)
    app = typer.Typer()
    app.command()(serve)
    try:
        app(arguments)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except (LatentGuardError, OSError) as error:
        os.write(2, f"Error: {error}".encode())
        os._exit(1)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(99)


def poll(child):
    """The exit code, negative for a signal; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


torch.set_num_threads(1)
ChatModel.load = classmethod(lambda cls, source, **_: Faulty(tiny_model()))
for line in sys.stdin:
    asked = json.loads(line)
    if "poll" in asked:
        answer = poll(asked["poll"])
    else:
        answer = start(asked["start"], asked["stderr"], asked["environment"])
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()
