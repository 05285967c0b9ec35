"""Files on a disk or in a bucket of Google Cloud Storage (gs://BUCKET/NAME): the few operations that this project needs.

A bucket has neither folders nor renames: an object appears, complete, when its upload ends. So this module writes a file to the
local disk, then uploads it. (A failed write through `fsspec.open` would leave a partial object.) On a disk the module renames
the file instead. Errors of a bucket become OSError, like errors of a disk. gcsfs finds the credentials: the machine's on Google
Cloud, elsewhere those of `gcloud auth application-default login`. STORAGE_EMULATOR_HOST names an emulator.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import posixpath
import re
import socket
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any

import fsspec
import numpy as np
from fsspec.config import conf

# A cached listing may be outdated: other processes, orbax and JAX write to the bucket, too.
conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of each error that `errors` turns into one line

Path = str | os.PathLike
# I/O errors that may pass by themselves.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNABORTED, errno.EBUSY,
           errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENETDOWN, errno.EPIPE}  # fmt: skip
_NETWORK = {"gcsfs", "google", "aiohttp", "requests"}  # packages whose exceptions mean trouble with a bucket


def is_remote(path: Path) -> bool:
  return str(path).startswith("gs://")


def check(path: Path, what: str) -> None:
  """Raises ValueError for an address that is neither a local path nor in a bucket. The error names the option `what`."""
  if "://" in str(path) and not re.match(r"gs://[a-z0-9][-_.a-z0-9]+/.", str(path)):
    raise ValueError(f"{what}={str(path)!r} is neither a local path nor gs://BUCKET/NAME")


def check_writable(folder: Path, what: str) -> None:
  """Makes a folder. Raises ValueError if the folder is not writable. The error names the option `what`."""
  probe = join(folder, f".writable-{socket.gethostname()}-{os.getpid()}")  # unique: other processes probe, too
  try:
    write_text(probe, "")
    remove(probe)
  except OSError as error:
    if error.errno in PASSING:
      raise
    reason = "there is no such bucket" if is_remote(folder) and error.errno == errno.ENOENT else error.strerror
    raise ValueError(f"{what}={str(folder)!r} can't be used: {reason}; give another folder") from None


def join(folder: Path, *names: Path) -> str:
  """Joins a folder and names. In a bucket it resolves "." and "..", since names of objects are no paths."""
  path = os.path.join(str(folder), *map(str, names))
  return f"gs://{posixpath.normpath(path[len('gs://') :])}" if is_remote(path) else path


def absolute(path: Path) -> str:
  return str(path) if is_remote(path) else os.path.abspath(path)


def user_cache(name: str) -> str:
  """A folder on this machine for files that the project can make again."""
  return str(pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "stdit_jax" / name)


def _bucket():
  return fsspec.filesystem("gs")


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
  """Turns an error of a bucket into the OSError of a disk: file missing, no permission, or EIO for any other error.

  A timeout becomes ETIMEDOUT. fsspec and asyncio raise TimeoutError without a number, like Pillow for a damaged file.
  """
  try:
    yield
  except Exception as error:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and is_remote(path):
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    if getattr(error, "code", 0) == 401 or (isinstance(error, OSError) and text.startswith("Forbidden")):
      reason = "no permission, or not signed in (gcloud auth application-default login)"
      raise PermissionError(errno.EACCES, reason, str(path)) from error
    if isinstance(error, TimeoutError) and is_remote(path):
      raise OSError(errno.ETIMEDOUT, "the bucket gives no answer in time", str(path)) from error
    if type(error).__module__.partition(".")[0] in _NETWORK:
      raise OSError(errno.EIO, f"the bucket gives no answer or an error ({text[:200]})", str(path)) from error
    raise


def stat(path: Path) -> tuple[int, int | str | None]:
  """Returns (bytes, a version that changes with the contents) of a file. Raises FileNotFoundError or IsADirectoryError."""
  if is_remote(path):
    with errors(path):
      found = _bucket().info(path)
    folder, size, version = found["type"] == "directory", found["size"], found.get("generation")
  else:
    found = os.stat(path)
    folder, size, version = os.path.isdir(path), found.st_size, found.st_mtime_ns
  if folder:
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  return size, version


def state_of(path: Path) -> tuple[int, int | str | None] | None:
  """`stat` of a file, None if the file cannot be read."""
  with contextlib.suppress(OSError):
    return stat(path)
  return None


def exists(path: Path) -> bool:
  """Whether a file or folder exists. A folder in a bucket exists if it holds an object."""
  if not is_remote(path):
    return os.path.exists(path)
  with errors(path):
    return _bucket().exists(path)


def is_folder(path: Path) -> bool:
  try:
    stat(path)
  except IsADirectoryError:
    return True
  except OSError as error:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
      raise
  return False


def names(folder: Path) -> list[str]:
  """Sorted names of the files and folders in a folder. The list is empty if the folder does not exist."""
  try:
    if not is_remote(folder):
      return sorted(os.listdir(folder))
    with errors(folder):
      return sorted(posixpath.basename(name.rstrip("/")) for name in _bucket().ls(str(folder), detail=False))
  except FileNotFoundError:
    return []


def files_below(folder: Path) -> Iterator[str]:
  """Yields the sorted paths of all files below a folder."""
  return (path for path, _ in states_below(folder))


def states_below(folder: Path, unread: Callable[[str], Any] = lambda folder: None) -> Iterator[tuple[str, tuple | None]]:
  """Yields (path, `state_of` the file) of all files below a folder, sorted. One request lists a bucket.

  The function does not follow links to folders. It calls `unread` with each folder that it may not read.
  """
  if is_remote(folder):
    with errors(folder):
      found = _bucket().find(folder, detail=True)
    for name in sorted(found, key=lambda name: name.split("/")):
      yield f"gs://{name}", (found[name]["size"], found[name].get("generation"))
    return
  try:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
  except PermissionError:
    unread(str(folder))
    return
  except FileNotFoundError:  # another process deleted it
    return
  for entry in entries:
    if entry.is_dir(follow_symlinks=False):
      yield from states_below(entry.path, unread)
    elif entry.is_file():
      yield entry.path, state_of(entry.path)


def open_file(path: Path) -> IO[bytes]:
  """Opens a file for reading bytes at any position. In a bucket every read is a request: wrap each read in `errors`."""
  if not is_remote(path):
    return open(path, "rb")
  with errors(path):
    return _bucket().open(path, "rb", cache_type="none")


def read_bytes(path: Path) -> bytes:
  with errors(path), open_file(path) as file:
    return file.read()


def read_text(path: Path) -> str:
  return read_bytes(path).decode()


def fingerprint(path: Path) -> str:
  """sha256 of a file, or of all files in a folder. For a large file, it hashes the size and 4 MB of evenly spaced blocks."""
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
def local_copy(path: Path) -> Iterator[Path]:
  """Yields a local path of a file: the file's own path, or a temporary copy of an object."""
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="stdit_jax-") as folder:
    copy = os.path.join(folder, posixpath.basename(path))
    with errors(path):
      _bucket().get_file(path, copy)
    yield copy


@contextlib.contextmanager
def whole(path: Path) -> Iterator[str]:
  """Yields a local path to write to, with the ending of `path`. Makes missing folders.

  The file appears at `path` when the block ends. It does not appear if the block raises an error.
  """
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
  # Processes of several hosts write to one folder, and their process ids may be equal.
  temporary = os.path.join(folder, f".{stem.lstrip('.')}.tmp{os.getpid()}-{uuid.uuid4().hex[:8]}{ending}")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)


def remove_leftovers(folder: Path, finished: Collection[str]) -> None:
  """Deletes the temporary files of killed writes to the names `finished`. No other process may be writing these files."""
  for name in names(folder):
    # `whole` puts .tmpPID-RANDOM before the ending. Older versions put .PID.tmp behind the ending.
    found = re.fullmatch(r"\.(.+?)(?:\.tmp\d+-[0-9a-f]{8}(\.[^.]*)?|\.\d+\.tmp)", name)
    if found and found[1] + (found[2] or "") in finished:
      remove(join(folder, name))


def write_text(path: Path, text: str) -> None:
  with whole(path) as temporary:
    pathlib.Path(temporary).write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
  if not is_remote(path):
    os.unlink(path)
    return
  with errors(path):
    _bucket().rm_file(path)


def move(folder: Path, place: Path) -> None:
  """Renames a folder. In a bucket, all objects are copied before the first one is deleted."""
  if not is_remote(folder):
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.rename(folder, place)
    return
  with errors(folder):
    files = _bucket().find(folder)
    _bucket().copy(files, [join(place, os.path.relpath(f"gs://{name}", folder)) for name in files])
    _bucket().rm(files)


def upload(folder: Path, place: Path) -> None:
  """Copies all files below a local folder into a bucket."""
  for path in files_below(folder):
    with errors(place):
      _bucket().put_file(path, join(place, os.path.relpath(path, folder)))


@contextlib.contextmanager
def local_folder(place: Path) -> Iterator[Path]:
  """Yields `place` if it is local. Else yields a temporary folder, and uploads it to `place` when the block ends."""
  if not is_remote(place):
    yield place
    return
  with tempfile.TemporaryDirectory(prefix="stdit_jax-") as folder:
    yield folder
    upload(folder, place)
