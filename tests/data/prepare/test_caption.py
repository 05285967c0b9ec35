"""Captions from a local HTTP server that fails in every way, a tiny model and files beside videos; cleaning."""

import base64
import hashlib
import http.server
import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import polars as pl
import pytest
from PIL import Image

from data.prepare import __main__ as main
from data.prepare import caption, caption_local, clean, endpoint
from data.prepare import config as configs
from tests.data.prepare.videos import two_scenes, write_video

REPOSITORY = pathlib.Path(__file__).parents[3]


class Server:
  """An OpenAI-compatible endpoint; captions depend on the question alone. `trouble(number)` is the error of each call."""

  def __init__(self, trouble=lambda number: ""):
    self.trouble, self.questions, self.lock = trouble, [], threading.Lock()
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
          server.questions.append({"path": self.path, "key": self.headers["authorization"], "at": time.monotonic(), **body})
          kind = server.trouble(len(server.questions))
        server.answer(self, body, kind)

      def log_message(self, *_):
        pass

    class Quiet(http.server.ThreadingHTTPServer):
      daemon_threads = True

      def handle_error(self, request, client_address):
        pass  # a killed client closes its connection

    self._server = Quiet(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
    threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()

  @staticmethod
  def text(body):
    content = {k: v for k, v in body.items() if k != "seed"}
    return f"Scene {hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]} with a rabbit."

  def answer(self, handler, body, kind):
    useless = {
      "refusal": "I'm sorry, but I cannot help with that.",
      "empty": "",
      "loop": "a cat and " * 200,
      "data": '{"a": 1}',
    }
    answer = {
      "choices": [{"message": {"role": "assistant", "content": useless.get(kind, self.text(body))}}],
      "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }
    content, status = json.dumps(answer).encode(), 200
    if kind.isdecimal():
      status, content = int(kind), b'{"error": "no"}'
    if kind == "slow":
      time.sleep(1.5)
    if kind == "html":
      content = b"<html>welcome</html>"
    if kind == "form":
      content = b'{"choices": []}'
    if kind == "endless":
      content = b"x" * (3 << 20)
    if kind == "drop":
      handler.connection.close()
      return
    handler.send_response(status)
    handler.send_header("content-type", "application/json")
    if status == 429:
      handler.send_header("retry-after", "0.3")
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2] if kind == "half" else content)
    if kind == "half":
      handler.connection.close()


@pytest.fixture
def server():
  made = []

  def make(trouble=lambda number: ""):
    made.append(Server(trouble))
    return made[-1]

  yield make
  for one in made:
    one.close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """A table of 24 clips of two files."""
  folder = tmp_path_factory.mktemp("clips")
  rows = []
  for i in range(2):
    path = write_video(folder / f"{i}.mp4", two_scenes(120, 0, seeds=(i, i)))
    rows += [{"path": str(path), "num_frames": 10, "height": 72, "width": 128, "fps": 24.0, "start": s, "end": s + 10}
             for s in range(0, 120, 10)]  # fmt: skip
  pl.DataFrame(rows).write_parquet(folder / "clips.parquet")
  return folder / "clips.parquet"


def command(clips, tmp_path, url, *more, name="out"):
  return ["caption", str(clips), "-o", str(tmp_path / f"{name}.parquet"), "--workers", "1", f"--url={url}", "--model=m",
          f"--cache={tmp_path / name}.sqlite", "--timeout=20.0", *more]  # fmt: skip


def texts(tmp_path, name="out"):
  return pl.read_parquet(tmp_path / f"{name}.parquet")["text"].to_list()


def test_questions_have_the_form_of_chat_completions(server, clips, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("MY_KEY", "secret")
  monkeypatch.setattr(caption, "_TOGETHER", 10)  # the 24 clips form three groups, as in a large shard
  one = server()
  arguments = command(clips, tmp_path, one.url, "--key_variable=MY_KEY", "--prices=(1.0,2.0)", "--side=64")
  assert main.main(arguments) == 0
  assert len(one.questions) == 24
  question = one.questions[0]
  assert question["path"] == "/v1/chat/completions"
  assert question["key"] == "Bearer secret"
  assert (question["model"], question["temperature"], question["max_tokens"]) == ("m", 0.0, 300)
  text, picture = question["messages"][0]["content"]
  assert "row by row in a grid" in text["text"]
  assert "{" not in text["text"]
  image = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))))
  assert image.size == (2 * 114, 2 * 64)
  assert all(t.startswith("Scene ") for t in texts(tmp_path))
  assert len(set(texts(tmp_path))) == 24
  printed = capsys.readouterr().out
  assert "24 questions, about" in printed
  assert "24 calls, 0 answers from the cache, 0 repeated, 2,400 tokens in, 480 out, cost 0.00336" in printed
  assert b"secret" not in (tmp_path / "out.parquet").read_bytes()
  # A second run has nothing to do. Clips with the same content ask no question twice.
  assert main.main(arguments) == 0
  os.unlink(tmp_path / "out.parquet")
  assert main.main(arguments) == 0
  assert len(one.questions) == 24


def test_an_endpoint_that_fails_in_every_way(server, clips, tmp_path):
  """One call in three fails, each in another way. The table equals that of a working endpoint."""
  kinds = ["500", "slow", "html", "429", "drop", "refusal", "empty", "form", "loop", "half", "endless", "data", "503"]
  bad = server(lambda number: kinds[number // 3 % len(kinds)] if number % 3 == 0 else "")
  assert main.main(command(clips, tmp_path, bad.url, "--concurrency=6", "--timeout=0.7", "--attempts=8")) == 0
  good = server()
  assert main.main(command(clips, tmp_path, good.url, name="good")) == 0
  assert texts(tmp_path) == texts(tmp_path, "good")
  assert len(bad.questions) > 30


def test_a_failing_endpoint_costs_only_its_rows(server, clips, tmp_path):
  """The next run repeats clips whose attempts all failed, and does not ask for the others again."""
  hopeless = server(lambda number: "500" if number > 10 else "")
  arguments = command(clips, tmp_path, hopeless.url, "--attempts=1", "--concurrency=2")
  assert main.main(arguments) == 0
  failed = pl.read_parquet(tmp_path / "out.parquet").filter(pl.col("error").is_not_null())
  assert failed.height == 14
  assert failed["retry"].all()
  assert failed["error"][0] == "caption: the endpoint failed 1 times, last: status 500"
  hopeless.trouble = lambda number: ""
  assert main.main(arguments) == 0
  assert len(hopeless.questions) == 24 + 14
  good = server()
  assert main.main(command(clips, tmp_path, good.url, name="good")) == 0
  assert pl.read_parquet(tmp_path / "out.parquet").equals(pl.read_parquet(tmp_path / "good.parquet"))


def test_an_unreachable_endpoint_ends_the_run(server, clips, tmp_path, capsys):
  """At once, not after all attempts for every clip."""
  one = server()
  one.close()
  assert main.main(command(clips, tmp_path, one.url, "--attempts=2")) == 2
  error = capsys.readouterr().err
  assert error.startswith(f"error: caption: no answer from {one.url}")
  assert "is the endpoint running?" in error
  assert not (tmp_path / "out.parquet").exists()


def test_a_killed_run_keeps_its_answers(server, clips, tmp_path):
  one = server(lambda number: time.sleep(0.05) or "")
  arguments = command(clips, tmp_path, one.url, "--concurrency=1")
  run = subprocess.Popen([sys.executable, "-m", "data.prepare", *arguments], stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 30
  while len(one.questions) < 8 and time.monotonic() < deadline:
    time.sleep(0.02)
  run.kill()
  run.wait()
  assert not (tmp_path / "out.parquet").exists()
  assert main.main(arguments) == 0
  assert len(one.questions) <= 24 + 1  # only the question that was under way is repeated
  assert len(set(texts(tmp_path))) == 24


def test_a_full_disk_ends_the_questions(server, clips, tmp_path):
  """A limit on file sizes simulates the full disk. The next run does not repeat answered questions."""
  one = server()
  arguments = command(clips, tmp_path, one.url, "--concurrency=1")
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
  run = [sys.executable, "-m", "data.prepare", *arguments]
  done = subprocess.run(run, preexec_fn=limit, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: caption: answers can't be stored in {tmp_path / 'out'}.sqlite (")
  assert done.stderr.count("\n") == 1
  asked = len(one.questions)
  assert 1 < asked < 24
  assert main.main(arguments) == 0
  assert len(one.questions) == 24 + 1
  assert len(set(texts(tmp_path))) == 24


def test_a_wrong_key_ends_the_run(server, clips, tmp_path, capsys):
  one = server(lambda number: "401")
  assert main.main(command(clips, tmp_path, one.url)) == 2
  assert "the endpoint refuses: status 401" in capsys.readouterr().err
  one.trouble = lambda number: "400" if number % 4 == 0 else ""
  assert main.main(command(clips, tmp_path, one.url)) == 0
  failed = pl.read_parquet(tmp_path / "out.parquet").filter(pl.col("error").is_not_null())
  assert failed.height >= 5
  assert not failed["retry"].any()


def test_calls_per_minute(server, clips, tmp_path):
  one = server()
  assert main.main(command(clips, tmp_path, one.url, "--per_minute=1200")) == 0
  times = [q["at"] for q in one.questions]
  assert max(times) - min(times) >= 23 * 0.05 * 0.9


def test_the_cogvideox_chain_summarises_its_captions(server, clips, tmp_path):
  one = server()
  assert main.main(command(clips, tmp_path, one.url, "--chain=cogvideox", "--frame_seconds=0.2", "--concurrency=1")) == 0
  kinds = [[part["type"] for part in q["messages"][0]["content"]] for q in one.questions[:4]]
  assert kinds == [["text", "image_url"]] * 3 + [["text"]]
  short, first, second, summary = (
    Server.text({k: v for k, v in q.items() if k not in ("path", "key", "at")}) for q in one.questions[:4]
  )
  prompt = one.questions[3]["messages"][0]["content"][0]["text"]
  assert f'"{short}"' in prompt
  assert f"1. {first}\n2. {second}\n" in prompt
  assert "at most 100 English words" in prompt
  assert texts(tmp_path)[0] == summary


def test_tags_have_their_own_column(server, clips, tmp_path):
  one = server()
  assert main.main(command(clips, tmp_path, one.url, "--prompt=tags", "--into=tags")) == 0
  found = pl.read_parquet(tmp_path / "out.parquet")
  assert "text" not in found.columns
  assert found["tags"].str.starts_with("Scene").all()
  assert "lecture (one person talks" in one.questions[0]["messages"][0]["content"][0]["text"]


def test_a_cache_survives_two_processes_and_foreign_bytes(tmp_path):
  cache = endpoint.Cache(str(tmp_path / "a" / "c.sqlite"))
  other = endpoint.Cache(str(tmp_path / "a" / "c.sqlite"))
  cache.put("k", "v'\n\x00字")
  assert other.get("k") == "v'\n\x00字"
  assert other.get("none") is None


# ---------------------------------------------------------------------------------------------------------------- existing


def test_existing_captions(tmp_path):
  write_video(tmp_path / "red_ball-01.mp4", two_scenes(5, 0))
  for name in ("b", "c", "d", "e", "f"):
    os.link(tmp_path / "red_ball-01.mp4", tmp_path / f"{name}.mp4")
  (tmp_path / "b.txt").write_text("A sidecar\ncaption.\n")
  (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
  os.mkfifo(tmp_path / "e.txt")  # reading it would wait for ever
  (tmp_path / "f.txt").write_text("long " * 30_000)
  timeline = [{"start": 0.1, "text": "first"}, {"start": 2.0, "text": "second"}]
  base = {"num_frames": 48, "height": 72, "width": 128, "fps": 24.0, "note": None, "line": None, "start": 0}
  rows = [{**base, "path": str(tmp_path / n), **more} for n, more in (
    ("red_ball-01.mp4", {}), ("b.mp4", {}), ("c.mp4", {}), ("d.mp4", {"note": " From a column. "}),
    ("d.mp4", {"line": timeline}), ("d.mp4", {"line": timeline, "start": 49}),
    ("d.mp4", {"line": timeline, "start": 24}), ("e.mp4", {}), ("f.mp4", {}))]  # fmt: skip
  pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
  arguments = ["caption", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "o.parquet"), "--backend=existing"]
  assert main.main([*arguments, "--column=note", "--sidecar=.txt", "--name=True", "--timeline=line"]) == 0
  found = pl.read_parquet(tmp_path / "o.parquet")
  assert found["text"][:6].to_list() == ["red ball 01", "A sidecar caption.", None, "From a column.", "first", "second"]
  assert found["text"][6:].null_count() == 3
  assert found["error"][2] == "caption: its caption file c.txt is not UTF-8 (byte 0)"
  assert found["error"][7:].to_list() == [
    "caption: its caption file e.txt is empty",
    "caption: its caption file f.txt has 150,000 bytes, more than 100,000",
  ]
  assert found["error"].null_count() == 6


def test_captions_of_a_list_are_kept(tmp_path):
  """This holds for configs/data/local.py, and for a backend that finds no other caption."""
  write_video(tmp_path / "v.mp4", two_scenes(5, 0))
  (tmp_path / "list.csv").write_text(",path,text\n1,v.mp4,A caption of mine.\n")  # pandas writes its index without a name
  local = dict(configs.load(str(REPOSITORY / "configs" / "data" / "local.py"))["caption"])
  for name, settings in (("a", local), ("b", dict(backend="existing", sidecar=".txt"))):
    values = dict(
      output=str(tmp_path / name), steps=("collect", "probe", "caption"), workers=1, caption=settings,
      collect=dict(sources=(str(tmp_path / "list.csv"),)), probe=dict(picture_hash=False),
    )  # fmt: skip
    configs.chain(values).run()
    assert pl.read_parquet(tmp_path / name / "caption" / "part-00000.parquet")["text"].to_list() == ["A caption of mine."]


# ------------------------------------------------------------------------------------------------------------------- local


def test_local_model_of_transformers(clips, tmp_path):
  """The captions equal those of `generate` of the model itself, a tiny BLIP with random weights."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  from tokenizers import Tokenizer, models, pre_tokenizers

  torch.manual_seed(1)
  words = ["[PAD]", "[SEP]", "[BOS]", "[UNK]", *(f"word{i}" for i in range(28))]
  fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
  fast.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=fast, pad_token="[PAD]", sep_token="[SEP]", bos_token="[BOS]", unk_token="[UNK]", cls_token="[BOS]"
  )
  small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
  config = transformers.BlipConfig(
    text_config=dict(
      small, vocab_size=32, bos_token_id=2, eos_token_id=1, sep_token_id=1, pad_token_id=0, encoder_hidden_size=16),
    vision_config=dict(small, image_size=32, patch_size=16), projection_dim=8,
  )  # fmt: skip
  model = transformers.BlipForConditionalGeneration(config).eval()
  images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
  model.save_pretrained(tmp_path / "blip")
  transformers.BlipProcessor(images, tokenizer).save_pretrained(tmp_path / "blip")
  step = configs.create(
    caption.Caption, dict(backend="local", model=str(tmp_path / "blip"), frames=1, side=32, max_tokens=6), "caption"
  )
  captioner = caption_local.LocalCaptioner(step)
  pictures = [caption._pictures(captioner.pictures, row, None) for row in pl.read_parquet(clips).head(3).to_dicts()]
  found = captioner.make([{"num_frames": 10}] * 3, pictures)
  opened = [Image.open(io.BytesIO(p[0])) for p in pictures]
  with torch.no_grad():
    wanted = model.generate(images(images=opened, return_tensors="pt")["pixel_values"], max_new_tokens=6, do_sample=False)
  for text, one in zip(found, tokenizer.batch_decode(wanted, skip_special_tokens=True)):
    assert text == caption_local._checked(one)
  with pytest.raises(ValueError, match="is no folder"):
    configs.create(caption.Caption, dict(backend="local", model="/nowhere"), "caption")


# ------------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
  ("text", "reason"),
  [("", "fewer"), ("ok then", "fewer"), ("I'm sorry, I can't see that.", "refusal"), ("As an AI language model I", "refusal"),
   ('{"text": "a cat sits here"}', "plain"), ("<p>a cat sits</p>", "plain"), ("a b c " * 40, "repeats"),
   ("word " * 3000, "too long"), ("one two " + "x" * 80, "too long"), ("a cat \x07 sits here", "plain")],
)  # fmt: skip
def test_useless_answers(text, reason):
  with pytest.raises(ValueError, match=reason):
    caption.usable(text)


def test_usable_answers():
  assert caption.usable('```text\n"A cat sits.\nIt sleeps."\n```') == "A cat sits. It sleeps."
  chinese = (
    "一只兔子从山洞里出来,在草地上伸懒腰。" * 4 + "阳光照在它的毛上,远处有一条小河,河边站着一只鸟,它慢慢地走过去,看着水里的鱼。"
  )
  assert caption.usable(chinese[80:]) == chinese[80:]
  assert caption.usable("猫が庭で遊んでいます") == "猫が庭で遊んでいます"
  assert caption.usable("แมวนั่งอยู่ในสวน") == "แมวนั่งอยู่ในสวน"
  with pytest.raises(ValueError, match="repeats"):
    caption.usable("一只猫" * 30)
  with pytest.raises(ValueError, match="fewer"):
    caption.usable("猫")


def test_frames_fill_a_grid_row_by_row():
  images = [np.full((2, 3, 3), i, np.uint8) for i in range(1, 6)]
  grid = caption.as_grid(images)
  assert grid.shape == (4, 9, 3)
  assert grid[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize(
  ("text", "cleaned"),
  [
    ("The video shows a cat.", "A cat."),
    ("In this image, we can see two dogs.", "Two dogs."),
    ("This short video clip captures the sea.", "The sea."),
    ("Here is a detailed caption of the video: A bird.", "A bird."),
    ("We see a hill.", "A hill."),
    ("The cat sees the video.", "The cat sees the video."),
    ("In the evening a bird sings.", "In the evening a bird sings."),
    ("Videos show up.", "Videos show up."),
  ],
)
def test_openings_of_captions_are_removed(text, cleaned):
  assert clean.without_opening(text) == cleaned


def test_cleaning_a_table(tmp_path):
  table = pl.DataFrame({"text": ["The video shows  a <b>cat</b> 12345678.", "", None, "A hill."],
                        "error": [None, None, None, "x: y"],
                        "cmotion": ["pan_left", "static", None, "pan_left"]})  # fmt: skip
  table.write_parquet(tmp_path / "t.parquet")
  arguments = [
    "clean",
    str(tmp_path / "t.parquet"),
    "-o",
    str(tmp_path / "o.parquet"),
    "--t5=True",
    "--camera=True",
    "--tokenizer=byt5",
  ]
  assert main.main(arguments) == 0
  rows = pl.read_parquet(tmp_path / "o.parquet")
  assert rows["text"][0] == "a cat . Camera motion: pan left."
  assert rows["words"][0] == 7
  assert rows["text_len"][0] == len(rows["text"][0]) + 1  # bytes and the end token
  assert rows["error"].to_list() == [None, "clean: no caption", "clean: no caption", "x: y"]
  assert "cmotion" not in rows.columns
