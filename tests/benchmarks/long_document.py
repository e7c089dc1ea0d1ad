"""One long document: peak memory of `jaxgpt data`, by tokenizer.

  python tests/benchmarks/long_document.py [megabytes] [tokenizer specifications...]

The document is one text file of this machine's own text (sources, documentation), which is not cut
(`--cut-chars=0`; above 64 MiB it becomes two documents). The peak is the resident set of the one
process that does the work, and that of a document of some bytes is printed for comparison.
"""

import pathlib
import subprocess
import sys
import tempfile

from prepare import machine_texts  # the file next to this one

MEGABYTES = 79.6
TOKENIZERS = ("bytes", "sentencepiece:8000")
RUN = """
import resource, sys
from jaxgpt.commands import main
code = main.main(["data", *sys.argv[1:]])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"peak {peak / 1e3:,.0f} MB", file=sys.stderr)
sys.exit(code)
"""


def write_document(path, size):
  """Writes `size` bytes of text, which repeats if this machine has less."""
  with path.open("w", encoding="utf-8") as out:
    while out.tell() < size:
      for text in machine_texts(size):
        out.write(text)
        if out.tell() >= size:
          break
  with path.open("rb+") as f:
    f.truncate(size)


def peak(path, out, tokenizer):
  """The last line of a preparation's stderr: its peak memory."""
  command = [sys.executable, "-c", RUN, str(path), f"--out={out}", f"--tokenizer={tokenizer}"]
  command += ["--cut-chars=0", "--validation=0", "--test=0", "--executor=process"]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return done.stderr.splitlines()[-1]


def main(megabytes, tokenizers):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    sizes = {"short": 600_000, "long": int(megabytes * 1e6)}
    for name, size in sizes.items():
      write_document(folder / f"{name}.txt", size)
    for number, tokenizer in enumerate(tokenizers):
      for name, size in sizes.items():
        line = peak(folder / f"{name}.txt", folder / f"{name}{number}", tokenizer)
        print(f"{size / 1e6:6.1f} MB, --tokenizer={tokenizer}: {line}", flush=True)


if __name__ == "__main__":
  main(float(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES, sys.argv[2:] or TOKENIZERS)
