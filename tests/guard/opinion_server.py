"""A stand-in for a moderation endpoint and for a guard model behind a chat endpoint."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def moderation(body):
    """Flags what holds the word "bad"."""
    return {"results": [{"flagged": "bad" in body["input"].split()}]}


def llama_guard(body):
    """The same, in the words of Llama Guard."""
    is_bad = "bad" in body["messages"][-1]["content"].split()
    content = "\n\nunsafe\nS1" if is_bad else "\n\nsafe"
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


class OpinionServer(ThreadingHTTPServer):
    """Answers with what ``reply`` makes of the body; a number is a status."""

    request_queue_size = 64

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.asked = []
        """Path, authorization and body of each request."""

        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.reply(body)
        status = answer if isinstance(answer, int) else 200
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def opinion_server(reply=moderation):
    """A running server."""
    server = OpinionServer(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
