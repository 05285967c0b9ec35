"""A stand-in for Google Cloud Storage, with the part of its JSON API that gcsfs, orbax and tensorstore use.

As in the real store, an object appears when its upload ends, a request may name a generation, and listings have pages.
"""

import contextlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "clips"
PAGE = 50  # names; the real store gives up to 1000


class ObjectStore:
  """A server on this machine.

  Attributes:
    objects: {name: (bytes, generation)}.
    requests: [(method, path)] so far.
    refuse: (method, path, query) -> None, or the status of a refusal, or 0 to hang up without an answer.
  """

  def __init__(self):
    self.objects, self.requests, self.uploads, self.lock = {}, [], {}, threading.RLock()
    self.refuse, self._generation = lambda method, path, query: None, 0
    self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
    self._server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()

  def environment(self):
    """Environment variables that point gcsfs and tensorstore to this store."""
    # gcsfs asks for the kind of a real bucket by gRPC, which this store does not have.
    return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url,
            "TENSORSTORE_GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # fmt: skip

  def names(self, prefix=""):
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def read(self, name):
    return self.objects[name][0]

  def write(self, name, content):
    with self.lock:
      self._generation += 1
      self.objects[name] = content, self._generation

  def copy_in(self, folder, prefix):
    """Copies all files of a local folder into the store."""
    for path in folder.rglob("*"):
      if path.is_file():
        self.write(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

  def copy_out(self, prefix, folder):
    for name in self.names(f"{prefix}/"):
      path = folder / name.removeprefix(f"{prefix}/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self.read(name))

  def resource(self, name):
    content, generation = self.objects[name]
    return {"kind": "storage#object", "bucket": BUCKET, "name": name, "size": str(len(content)), "metageneration": "1",
            "generation": str(generation), "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}  # fmt: skip

  def allowed(self, name, query):
    """Whether an object has the generation that a request names. A missing object has generation 0."""
    found = self.objects[name][1] if name in self.objects else 0
    return int(query.get("ifGenerationMatch", found)) == found != int(query.get("ifGenerationNotMatch", -1))


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  wbufsize = -1  # head and content in one packet; otherwise each answer waits for an acknowledgement
  store: ObjectStore

  def handle(self):
    # A client may hang up before the end, when it has what it needs.
    with contextlib.suppress(ConnectionError):
      super().handle()

  def finish(self):
    with contextlib.suppress(ConnectionError):
      super().finish()

  def log_message(self, *_):
    pass

  def _handle(self):
    self.connection.settimeout(60)
    url, body = urlsplit(self.path), self._body()
    query = {key: values[0] for key, values in parse_qs(url.query).items()}
    self.store.requests.append((self.command, unquote(url.path)))
    if (status := self.store.refuse(self.command, unquote(url.path), query)) is not None:
      if not status:
        self.close_connection = True
        return
      return self._answer(status)
    if not (place := re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", url.path)):
      return self._answer(501)
    bucket, listing, name = place.groups()
    if bucket != BUCKET:
      return self._answer(404)
    with self.store.lock:
      if url.path.startswith("/upload"):
        self._upload(query, body)
      elif not listing:
        self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
      elif name is None:
        self._list(query)
      elif copy := re.fullmatch(r"(.*)/rewriteTo/b/[^/]+/o/(.*)", name):
        self._rewrite(*map(unquote, copy.groups()))
      else:
        self._object(unquote(name), query)

  do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - http.server's names

  def _body(self):
    if self.headers.get("Transfer-Encoding") == "chunked":
      chunks = []
      while size := int(self.rfile.readline(), 16):
        chunks.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(chunks)
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def _answer(self, status, content=b"", **headers):
    if status >= 400:
      content = {"error": {"code": status, "message": f"the stand-in answers {status}"}}
    if isinstance(content, dict):
      content = json.dumps(content).encode()
      headers["Content-Type"] = "application/json"
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    if status != 204:
      self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def _list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    names, folders = [], []
    for name in self.store.names(prefix):
      if not query.get("startOffset", "") <= name or ("endOffset" in query and name >= query["endOffset"]):
        continue
      head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
      if not found:
        names.append(name)
      elif (folder := prefix + head + delimiter) not in folders:
        folders.append(folder)
    start, size = int(query.get("pageToken", 0)), min(PAGE, int(query.get("maxResults", PAGE)))
    page = sorted(names + folders)[start : start + size]
    result = {"kind": "storage#objects", "items": [self.store.resource(n) for n in page if n in names]}
    result["prefixes"] = [n for n in page if n in folders]
    if start + size < len(names) + len(folders):
      result["nextPageToken"] = str(start + size)
    self._answer(200, result)

  def _object(self, name, query):
    if self.command == "DELETE":
      if name in self.store.objects and self.store.allowed(name, query):
        del self.store.objects[name]
        return self._answer(204)
      return self._answer(412 if name in self.store.objects else 404)
    if name not in self.store.objects:
      return self._answer(404)
    if not self.store.allowed(name, query):
      return self._answer(304 if "ifGenerationNotMatch" in query else 412)
    if query.get("alt") != "media":
      return self._answer(200, self.store.resource(name))
    content, generation = self.store.objects[name]
    headers = {"X_Goog_Generation": generation, "X_Goog_Stored_Content_Length": len(content)}
    if not (wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
      return self._answer(200, content, **headers)
    first, last = wanted.groups()
    begin = int(first) if first else max(0, len(content) - int(last))
    end = min(len(content), int(last) + 1) if first and last else len(content)
    if begin >= end:
      return self._answer(416)
    self._answer(206, content[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(content)}", **headers)

  def _rewrite(self, source, target):
    if source not in self.store.objects:
      return self._answer(404)
    self.store.write(target, self.store.read(source))
    self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": self.store.resource(target)})

  def _upload(self, query, body):
    if upload := query.get("upload_id"):
      return self._chunk(upload, body)
    name, content = query.get("name"), body
    if query["uploadType"] == "resumable":
      upload = os.urandom(8).hex()
      self.store.uploads[upload] = name or json.loads(body)["name"], query, bytearray()
      return self._answer(200, {}, Location=f"{self.store.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={upload}")
    if query["uploadType"] == "multipart":
      described, content = self._parts(body)
      name = json.loads(described)["name"]
    self._finish(name, query, content)

  def _parts(self, body):
    """The two parts of a multipart upload: its description and its bytes. gcsfs ends lines with \\n alone."""
    line = rb"--" + re.escape(re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode())
    part = line + rb"\r?\n.*?\n\r?\n"
    return re.fullmatch(rb"\s*" + part + rb"(.*?)\r?\n" + part + rb"(.*)\n" + line + rb"--\s*", body, re.DOTALL).groups()

  def _chunk(self, upload, body):
    if upload not in self.store.uploads:
      return self._answer(404)
    name, query, content = self.store.uploads[upload]
    if self.command == "DELETE":
      del self.store.uploads[upload]
      return self._answer(499)
    content += body
    if re.search(r"/\*$", self.headers.get("Content-Range", "")):
      return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
    if len(content) < int(self.headers["Content-Range"].rpartition("/")[2]):
      return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
    del self.store.uploads[upload]
    self._finish(name, query, bytes(content))

  def _finish(self, name, query, content):
    if not self.store.allowed(name, query):
      return self._answer(412)
    self.store.write(name, content)
    self._answer(200, self.store.resource(name))
