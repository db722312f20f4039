"""A store in memory that speaks the part of the JSON API of Google Cloud Storage that gcsfs and TensorStore use.

Processes reach it through the variables of `FakeStore.environment`. Objects have generations, and there is neither append nor
rename. `deny` refuses every request, `deny_writes` those that change something, `fail_every` answers each n-th request with 503,
`hold_after` makes a moment to kill a client.
"""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_BUCKET = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?")


class FakeStore:
    """A running store. `objects` holds the content and generation of each object, by "bucket/name".

    `written` names the object of each write.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[str] = []
        self.written: list[str] = []
        self.deny = self.deny_writes = False
        self.fail_every = 0
        self._held_prefix, self._held_after = "", 0
        self._answering = threading.Event()
        self._answering.set()
        self.lock, self.generations, self.uploads = threading.Lock(), count(1), dict[str, Any]()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use this store for gs://."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, prefix: str) -> list[str]:
        """Names of objects, "bucket/name", sorted."""
        return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, content: bytes) -> None:
        """Write an object, "bucket/name"."""
        with self.lock:
            self.objects[name] = content, next(self.generations)

    def hold_after(self, prefix: str, writes: int) -> None:
        """Answer no request after so many further writes of objects with this prefix, until `drop_held`."""
        self._held_prefix, self._held_after = prefix, writes

    @property
    def holds(self) -> bool:
        """Whether requests are held."""
        return not self._answering.is_set()

    def drop_held(self) -> None:
        """Drop what was asked meanwhile, and answer again."""
        self._answering.set()

    def note_write(self, key: str) -> None:
        """Take note of a written object; the lock is held."""
        self.written.append(key)
        if self._held_after and key.startswith(self._held_prefix):
            self._held_after -= 1
            if not self._held_after:
                self._answering.clear()

    def drop_if_held(self) -> None:
        """Raise ConnectionAbortedError at `drop_held` for a request that came before it."""
        if self.holds:
            self._answering.wait()
            raise ConnectionAbortedError("its client was killed")

    def reset(self) -> None:
        """Delete everything, and answer every request."""
        self.objects.clear()
        self.requests.clear()
        self.written.clear()
        self.deny = self.deny_writes = False
        self.fail_every = 0

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    store: FakeStore

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"code": status, "message": message}})

    def _handle(self) -> None:
        store, url = self.server.store, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store.drop_if_held()
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with store.lock:
            store.requests.append(f"{self.command} {self.path}")
            failing = store.fail_every and len(store.requests) % store.fail_every == 0
        if store.deny or (store.deny_writes and self.command in ("POST", "PUT", "DELETE")):
            return self._error(403, "the caller does not have storage.objects access")
        if failing:
            return self._error(503, "try again")
        match = _BUCKET.fullmatch(url.path)
        if match is None:
            return self._error(404, f"no such path: {url.path}")
        bucket, name = match[1], match[2] and unquote(match[2])
        if url.path.startswith("/upload"):
            return self._upload(bucket, query, body)
        if name is not None:
            return self._object(
                f"{bucket}/{name}", query, download=url.path.startswith("/download") or query.get("alt") == "media"
            )
        if url.path.endswith("/o"):
            return self._list(bucket, query)
        return self._answer(200, {"kind": "storage#bucket", "name": bucket, "location": "US", "storageClass": "STANDARD"})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle  # noqa: N815

    def _fields(self, key: str, content: bytes, generation: int) -> dict[str, Any]:
        bucket, _, name = key.partition("/")
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": f"E{generation}",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _object(self, key: str, query: dict[str, str], *, download: bool) -> None:
        store = self.server.store
        with store.lock:
            found = store.objects.get(key)
            if found is not None and self.command == "DELETE":
                del store.objects[key]
        if found is None:
            return self._error(404, f"No such object: {key}")
        content, generation = found
        if self.command == "DELETE":
            return self._answer(204)
        if not download:
            return self._answer(200, self._fields(key, content, generation))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._error(304, "not modified")
        headers = {"X_Goog_Generation": str(generation), "Content_Type": "application/octet-stream"}
        if ranged := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(ranged[1]) if ranged[1] else len(content) - int(ranged[2])
            last = min(int(ranged[2]), len(content) - 1) if ranged[1] and ranged[2] else len(content) - 1
            if first >= len(content):
                return self._error(416, "out of range")
            span = {"Content_Range": f"bytes {first}-{last}/{len(content)}"}
            return self._answer(206, content[first : last + 1], **headers, **span)
        return self._answer(200, content, **headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter, start = query.get("prefix", ""), query.get("delimiter"), query.get("startOffset", "")
        items, folders = [], dict[str, None]()
        with self.server.store.lock:
            objects = sorted(self.server.store.objects.items())
        for key, (content, generation) in objects:
            name = key.partition("/")[2]
            if not key.startswith(f"{bucket}/{prefix}") or name < start or ("endOffset" in query and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                items.append(self._fields(key, content, generation))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": list(folders)})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        store = self.server.store
        if query.get("uploadType") == "resumable" and "upload_id" not in query:
            number = str(next(store.generations))
            store.uploads[number] = (json.loads(body or b"{}").get("name") or query["name"], query, b"")
            address = f"{store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self._answer(200, b"", Location=address)
        if number := query.get("upload_id"):
            name, query, before = store.uploads[number]
            body, total = before + body, self.headers["Content-Range"].rpartition("/")[2]
            if str(len(body)) != total:
                store.uploads[number] = name, query, body
                return self._answer(308, b"", Range=f"bytes=0-{len(body) - 1}")
        elif query.get("uploadType") == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert boundary is not None
            described, content = body.split(b"--" + boundary[1].encode())[1:3]  # as gcsfs writes them, with bare line feeds
            name = json.loads(described.partition(b"\n\n")[2])["name"]
            body = content.partition(b"\n\n")[2].removesuffix(b"\n")
        else:
            name = query["name"]
        key = f"{bucket}/{name}"
        with store.lock:
            generation = store.objects[key][1] if key in store.objects else 0
            expected = query.get("ifGenerationMatch")
            if expected is not None and int(expected) != generation:
                return self._error(412, "the generation does not match")
            store.objects[key] = body, (generation := next(store.generations))
            store.note_write(key)
        return self._answer(200, self._fields(key, body, generation))
