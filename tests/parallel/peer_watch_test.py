"""The peer watch of three processes, as three objects in this one."""

import os
import socket
import threading

import pytest

from jaxgpt.parallel import peer_watch

NAMES = [f"process {i} of 3 (host{i})" for i in range(3)]


@pytest.fixture
def lines(monkeypatch):
  """Three connected watches, and for each the notices that would have ended its process."""
  monkeypatch.setattr(peer_watch, "_GRACE", 0.1)
  listener, ends = peer_watch.listen(), [[] for _ in NAMES]
  address = ("127.0.0.1", listener.getsockname()[1])
  made = [None] * 3

  def make(i):
    made[i] = peer_watch.PeerWatch(
      i, NAMES, address, "secret", listener if i == 0 else None, ends[i].append
    )

  threads = [threading.Thread(target=make, args=(i,)) for i in range(3)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  return made, ends


def cut(line):
  """Closes connections, as the kernel does when a process is killed."""
  for end in list(line._lines.values()):
    end.shutdown(socket.SHUT_RDWR)


def test_a_process_that_is_gone_ends_the_others(lines):
  made, _ = lines
  cut(made[2])
  want = peer_watch.Notice(2, peer_watch.EXIT_LOST, None)
  assert made[0].wait(5) == want and made[1].wait(5) == want
  assert "process 2 of 3 (host2) was lost" in made[1].describe(want)


def test_the_first_process_that_is_gone_ends_the_others(lines):
  made, _ = lines
  cut(made[0])
  assert [made[i].wait(5).code for i in (1, 2)] == [peer_watch.EXIT_LOST] * 2


def test_an_error_goes_to_all_and_the_first_one_counts(lines):
  made, ends = lines
  notice = made[1].fail("no such file", 2)
  assert notice == (1, 2, "no such file")
  assert made[2].fail("no such file", 2) == notice and made[0].fail("no such file", 2) == notice
  assert made[0].describe(notice) == "process 1 of 3 (host1): no such file"
  assert made[1].describe(notice) == "no such file"
  for _ in range(50):
    if ends[2]:
      break
    threading.Event().wait(0.1)
  assert ends[2] == [notice]


def test_a_process_that_is_done_is_not_missed(lines):
  made, ends = lines
  for line in made:
    line.done()
  cut(made[2])
  assert made[0].wait(0.5) is None and not any(ends)


def test_strangers_are_not_listened_to(lines):
  made, _ = lines
  port = made[0]._listener.getsockname()[1]
  for hello in (
    b"GET / HTTP/1.1\r\n\r\n",
    b"3\n",
    b'{"token": "x", "process": 1}\n',
    b'{"process": 1, "code": 2, "message": "gotcha"}\n',
    os.urandom(100),
  ):
    with socket.create_connection(("127.0.0.1", port)) as s:
      s.sendall(hello)
  assert made[0].wait(0.5) is None
  assert made[1].fail("still heard", 2) == (1, 2, "still heard")
