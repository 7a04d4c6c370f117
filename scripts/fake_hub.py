"""A Hub in a thread of this process, in the layout that downloads expect, as slow as asked."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 15


class FakeHub:
    """`repos` names, by `OWNER/NAME` (with `datasets/` before it for a data set), the bytes of each file. `damage(file, bytes)` may
    return others, which are then sent in their place."""

    def __init__(self, repos, bytes_per_s=None, damage=None):
        self.repos, self.bytes_per_s, self.damage = repos, bytes_per_s, damage
        self.requests = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def tag(file, content):
        """SHA-256 for what stands in the store of large files, the id of a git blob for the rest."""
        if file.endswith((".safetensors", ".parquet")):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path).lstrip("/")
        self.requests.append((request.command, path, request.headers.get("Range")))
        try:
            if path.startswith("api/"):
                self.describe(request, path.removeprefix("api/").removeprefix("models/"))
            else:
                repo, _, rest = path.partition("/resolve/")
                self.content(request, self.repos[repo], rest.partition("/")[2])
        except KeyError:
            self.send(request, 404, {"X-Error-Code": "EntryNotFound"}, b"<html>no such page</html>")
        except OSError:
            pass  # The client was killed.

    def describe(self, request, path):
        repo = path.partition("/revision/")[0]
        siblings = [{"rfilename": file} for file in sorted(self.repos[repo])]
        text = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        self.send(request, 200, {"Content-Type": "application/json"}, text)

    def content(self, request, files, file):
        content = files[file]
        headers = {"ETag": f'"{self.tag(file, content)}"', "X-Repo-Commit": COMMIT}
        if request.command == "HEAD":
            return self.send(request, 200, {**headers, "Content-Length": str(len(content))}, b"")
        n, begin, status = len(content), 0, 200
        if self.damage:
            content = self.damage(file, content)
        asked = request.headers.get("Range")
        if asked:
            begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {begin}-{n - 1}/{n}"
        self.send(request, status, headers, content[begin:])

    def send(self, request, status, headers, body):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        for at in range(0, len(body), PIECE):
            request.wfile.write(body[at : at + PIECE])
            if self.bytes_per_s:
                request.wfile.flush()
                time.sleep(PIECE / self.bytes_per_s)
