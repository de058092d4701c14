"""Lines of the log: one an event, whole, and without the words of an exception."""

import json
import logging

import pytest

from latentguard.serve.logs import JsonFormatter, LogFormatter


def record(message, *values, error=None):
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("latentguard.serve", logging.ERROR, "", 1, message, values, info)


def failure():
    try:
        raise ValueError("what the client said")
    except ValueError as error:
        return error


@pytest.mark.parametrize("formatter", [LogFormatter(), JsonFormatter()])
def test_a_line_has_no_line_end_and_no_words_of_an_exception(formatter):
    line = formatter.format(record("first %s\nsecond", "a\nb", error=failure()))
    assert "\n" not in line
    assert "what the client said" not in line
    assert "ValueError < failure" in line


def test_an_object_holds_time_level_logger_and_message():
    line = json.loads(JsonFormatter().format(record("the %s", "message")))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "error", "logger": "latentguard.serve", "message": "the message"}
