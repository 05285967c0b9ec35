"""What every command that makes sharded files shares: how several processes divide the shards."""


def parse_shard(text: str) -> tuple[int, int]:
  """Value of `--shard`, "I/N" -> (I, N): this process makes every N-th shard, from the I-th on. Raises ValueError."""
  index, _, count = text.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise ValueError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/2")
  return int(index), int(count)
