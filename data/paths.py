"""Files on a disk or in a bucket of Google Cloud Storage (gs://BUCKET/NAME): the few operations that this project needs.

A bucket has neither folders nor a rename: an object appears, whole, when its upload ends. So a file is written to the local
disk and then uploaded, where on a disk it is renamed (fsspec's own files would keep what a writer had written when it failed).
What a bucket refuses is an OSError, as of a disk. gcsfs finds the credentials: the machine's on Google Cloud, elsewhere those
of `gcloud auth application-default login`; STORAGE_EMULATOR_HOST names a stand-in.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import posixpath
import re
import shutil
import socket
import tempfile
import uuid

import fsspec
import numpy as np

# Other processes write there too, and so do orbax and JAX, by file systems of their own: nobody may trust an old listing.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of what `errors` makes one line of

_NETWORK = {"gcsfs", "google", "aiohttp", "requests"}  # packages whose exceptions are trouble with a bucket


def is_remote(path):
  return str(path).startswith("gs://")


def check(path, what):
  """Raises ValueError, naming `what` it is, for an address that is neither a local path nor something in a bucket."""
  if "://" in str(path) and not re.match(r"gs://[a-z0-9][-_.a-z0-9]+/.", str(path)):
    raise ValueError(f"{what}={str(path)!r} is neither a local path nor gs://BUCKET/NAME")


def check_writable(folder, what):
  """Makes the folder; raises ValueError, naming `what` it is, when nothing can be written there."""
  probe = join(folder, f".writable-{socket.gethostname()}-{os.getpid()}")  # other processes try as well
  try:
    write_text(probe, "")
    remove(probe)
  except OSError as error:
    reason = "there is no such bucket" if is_remote(folder) and error.errno == errno.ENOENT else error.strerror
    raise ValueError(f"{what}={str(folder)!r} can't be used: {reason}; give another folder") from None


def join(folder, *names):
  """`folder`/`names`, as text; in a bucket "." and ".." are resolved, since its names are no paths."""
  path = os.path.join(str(folder), *map(str, names))
  return f"gs://{posixpath.normpath(path[len('gs://') :])}" if is_remote(path) else path


def absolute(path):
  return str(path) if is_remote(path) else os.path.abspath(path)


def user_cache(name):
  """Folder for what can be made again, on this machine."""
  return str(pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "stdit_jax" / name)


def _bucket():
  return fsspec.filesystem("gs")


@contextlib.contextmanager
def errors(path):
  """What a bucket refuses, as the OSError that a disk would give: missing, no permission, or else EIO."""
  try:
    yield
  except Exception as error:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and is_remote(path):
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    if getattr(error, "code", 0) == 401 or (isinstance(error, OSError) and text.startswith("Forbidden")):
      reason = "no permission, or not signed in (gcloud auth application-default login)"
      raise PermissionError(errno.EACCES, reason, str(path)) from error
    if type(error).__module__.partition(".")[0] in _NETWORK:
      raise OSError(errno.EIO, f"the bucket gives no answer or an error ({text[:200]})", str(path)) from error
    raise


def stat(path):
  """(bytes, number that changes with the contents) of a file. Raises FileNotFoundError, IsADirectoryError."""
  if not is_remote(path):
    found = os.stat(path)
    folder, size, version = os.path.isdir(path), found.st_size, found.st_mtime_ns
  else:
    with errors(path):
      found = _bucket().info(path)
    folder, size, version = found["type"] == "directory", found["size"], found.get("generation")
  if folder:
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  return size, version


def exists(path):
  """Whether there is a file, or a folder with something in it."""
  if not is_remote(path):
    return os.path.exists(path)
  with errors(path):
    return _bucket().exists(path)


def is_folder(path):
  try:
    stat(path)
  except IsADirectoryError:
    return True
  except OSError as error:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
      raise
  return False


def names(folder):
  """Names of the files and folders in a folder, sorted; none if it is not there."""
  try:
    if not is_remote(folder):
      return sorted(os.listdir(folder))
    with errors(folder):
      return sorted(posixpath.basename(name.rstrip("/")) for name in _bucket().ls(str(folder), detail=False))
  except FileNotFoundError:
    return []


def files_below(folder, unread=lambda folder: None):
  """Yields the paths of all files in a folder and in those in it, sorted. Links to folders are not followed; `unread` is called
  with those that may not be read."""
  return (path for path, _ in _below(folder, unread))


def states_below(folder, unread=lambda folder: None):
  """As `files_below`, (path, what `stat` says of it or None if it has gone), of a bucket in one listing."""
  for path, state in _below(folder, unread):
    if state is None:
      with contextlib.suppress(OSError):
        state = stat(path)
    yield path, state


def _below(folder, unread):
  if is_remote(folder):
    with errors(folder):
      found = _bucket().find(folder, detail=True)
    for name in sorted(found, key=lambda name: name.split("/")):
      yield f"gs://{name}", (found[name]["size"], found[name].get("generation"))
    return
  waiting = _entries(folder, unread)
  while waiting:
    entry = waiting.pop()
    if entry.is_dir(follow_symlinks=False):
      waiting += _entries(entry.path, unread)
    elif entry.is_file():
      yield entry.path, None


def _entries(folder, unread):
  """What is in a folder, in reverse order; nothing if it can't be read."""
  try:
    with os.scandir(folder) as found:
      return sorted(found, key=lambda entry: entry.name, reverse=True)
  except PermissionError:
    unread(str(folder))
  except FileNotFoundError:
    pass  # it has gone meanwhile
  return []


def open_file(path):
  """A file to read bytes from, at any position. In a bucket every read is a request, and raises what `errors` translates."""
  if not is_remote(path):
    return open(path, "rb")
  with errors(path):
    return _bucket().open(path, "rb", cache_type="none")


def read_bytes(path):
  with errors(path), open_file(path) as file:
    return file.read()


def read_text(path):
  return read_bytes(path).decode()


def fingerprint(path):
  """sha256 of a file, or of all files in a folder: of large ones the size and 4 MB from all over."""
  digest = hashlib.sha256()
  for name in files_below(path) if is_folder(path) else [path]:
    size, block = stat(name)[0], 1 << 16
    with errors(name), open_file(name) as file:
      digest.update(str(size).encode())
      for at in np.unique(np.linspace(0, max(0, size - block), min(64, -(-size // block)), dtype=np.int64)):
        file.seek(int(at))
        digest.update(file.read(block))
  return digest.hexdigest()


@contextlib.contextmanager
def local_copy(path):
  """A local name of a file: its own, or that of a temporary copy."""
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="stdit_jax-") as folder:
    copy = os.path.join(folder, posixpath.basename(path))
    with errors(path):
      _bucket().get_file(path, copy)
    yield copy


@contextlib.contextmanager
def whole(path):
  """A local name to write to, with the ending of `path`; the file is at `path` when the block ends, or not at all when it
  raises. Folders are made."""
  folder, name = os.path.split(str(path))
  stem, ending = os.path.splitext(name)
  if is_remote(path):
    with tempfile.TemporaryDirectory(prefix="stdit_jax-") as place:
      temporary = os.path.join(place, name)
      yield temporary
      with errors(path):
        _bucket().put_file(temporary, path)
    return
  os.makedirs(folder or ".", exist_ok=True)
  # Processes of several hosts, whose numbers may be equal, write to one folder.
  temporary = os.path.join(folder, f".{stem.lstrip('.')}.tmp{os.getpid()}-{uuid.uuid4().hex[:8]}{ending}")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)


def write_text(path, text):
  with whole(path) as temporary:
    pathlib.Path(temporary).write_text(text, encoding="utf-8")


def make_folder(path):
  """On a disk; buckets have none."""
  if not is_remote(path):
    os.makedirs(path, exist_ok=True)


def remove(path):
  if not is_remote(path):
    return os.unlink(path)
  with errors(path):
    _bucket().rm_file(path)


def move(folder, place):
  """A folder to another name. In a bucket the copy is complete before anything is removed."""
  if not is_remote(folder):
    os.makedirs(os.path.dirname(place), exist_ok=True)
    return os.rename(folder, place)
  with errors(folder):
    files = _bucket().find(folder)
    _bucket().copy(files, [join(place, os.path.relpath(f"gs://{name}", folder)) for name in files])
    _bucket().rm(files)


def upload(folder, place):
  """Copies the files of a local folder, and of those in it, into a bucket."""
  for path in files_below(folder):
    with errors(place):
      _bucket().put_file(path, join(place, os.path.relpath(path, folder)))


@contextlib.contextmanager
def local_folder(place):
  """`place` itself if it is local, else a temporary folder whose files are uploaded there when the block ends."""
  if not is_remote(place):
    yield place
    return
  folder = tempfile.mkdtemp(prefix="stdit_jax-")
  try:
    yield folder
    upload(folder, place)
  finally:
    shutil.rmtree(folder)
