"""What every command of this project shares."""

import argparse
import sys


class OneLineParser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are one line, without the usage in front."""

  def error(self, message):
    print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
    raise SystemExit(2)
