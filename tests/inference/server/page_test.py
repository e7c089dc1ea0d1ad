"""The page: nothing from elsewhere, and a click-through in headless Chromium."""

import contextlib
import os
import re

import pytest

from jaxgpt.inference.server import app
from tests.inference.server import fake
from tests.inference.server.limits_test import get


def test_the_page_is_one_file_without_anything_from_elsewhere(server):
  status, page = get(server, "/")
  assert status == 200
  assert not re.findall(r"""(?:src|href|action)=["']?(?!data:|#)[^"'\s>]+""", page)
  assert not re.findall(
    r"url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page
  )
  fetched = set(re.findall(r"""["'](/[\w/]+)["']""", page))
  assert fetched == {"/v1/models", "/v1/completions", "/v1/chat/completions"}


def test_the_page_may_run_its_own_script_alone():
  headers = app.page_headers(b"<style>a</style><script>b</script>")
  policy = headers["content-security-policy"]
  assert "default-src 'none'" in policy and "connect-src 'self'" in policy
  assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='" in policy
  assert "unsafe" not in policy


@pytest.fixture
def visit(browser):
  """A function (address, …) -> a page that has loaded. Any error of its script fails the test."""
  contexts, errors = [], []

  def go(url, **options):
    contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **options}))
    page = contexts[-1].new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
      "request",
      lambda request: request.url.startswith((url, "data:")) or errors.append(request.url),
    )
    page.on("console", lambda m: "Content Security Policy" in m.text and errors.append(m.text))
    page.goto(url)
    return page

  yield go
  for each in contexts:
    with contextlib.suppress(Exception):
      each.close()
  assert not errors


def picture(page, name):
  """Keeps a picture if $JAXGPT_SCREENSHOTS names a folder."""
  if folder := os.environ.get("JAXGPT_SCREENSHOTS"):
    page.screenshot(path=os.path.join(folder, f"{name}.png"))


def send(page, text):
  page.get_by_label("Message", exact=True).fill(text)
  page.locator("#send:enabled").wait_for()  # the page keeps a text until it knows the model
  page.keyboard.press("Enter")


def finished(page):
  page.get_by_role("button", name="Send").wait_for()
  return page.locator("article.assistant .body").last.inner_text()


def want(*messages):
  """The text of the answer to a conversation."""
  roles = ("user", "assistant")
  prompt = "\n".join(f"{roles[i % 2]}: {text}" for i, text in enumerate(messages))
  return "".join(fake.script(prompt.encode()))


def test_a_click_through(serve, visit):
  server = serve(fake.FakeEngine(seconds=0.005))
  page = visit(server.url)
  page.get_by_text("Talk to fake").wait_for()
  assert page.get_by_role("button", name="Send").is_disabled()

  send(page, "hello <b>you</b><script>alert(1)</script>")
  first = want("hello <b>you</b><script>alert(1)</script>")
  assert finished(page).strip() == first.strip()
  assert (
    page.locator("article.user .body").inner_text() == "hello <b>you</b><script>alert(1)</script>"
  )
  assert page.locator("article b").count() == page.locator("article script").count() == 0

  # Probabilities of a token, with the mouse and with the keyboard.
  page.locator("article.assistant [data-t]").nth(2).hover()
  tip = page.get_by_role("tooltip")
  assert "59.5 %" in tip.inner_text() and "<67>" in tip.inner_text()  # exp(-0.52)
  picture(page, "tooltip")
  page.locator("article.assistant .body").focus()
  page.keyboard.press("ArrowRight")
  assert "58.9 %" in tip.inner_text(), "the next token, exp(-0.53)"

  # The conversation goes on with what was said before.
  send(page, "and now?")
  page.locator("article").nth(3).wait_for()
  assert (
    finished(page).strip()
    == want("hello <b>you</b><script>alert(1)</script>", first, "and now?").strip()
  )

  # Another first question takes the place of the conversation from there on.
  page.get_by_role("button", name="Edit").first.click()
  assert page.locator("article").count() == 0
  send(page, "changed")
  assert finished(page).strip() == want("changed").strip()
  before = len(server.engine.requests)
  page.get_by_role("button", name="Again").click()
  page.locator("article[aria-busy]").first.wait_for(state="detached")
  assert finished(page).strip() == want("changed").strip()
  assert len(server.engine.requests) == before + 1

  # Settings reach the engine.
  page.get_by_role("button", name="Settings", exact=True).click()
  page.get_by_label("System message").fill("be brief")
  page.get_by_label("Temperature").fill("0.25")
  page.get_by_label("Most new tokens").fill("3")
  page.get_by_label("Seed").fill("11")
  page.get_by_text("Penalties and stops").click()
  page.get_by_label("Presence penalty").fill("0.5")
  page.get_by_label("Stop at").fill("zz\nyy")
  page.get_by_label("Token probabilities").uncheck()
  page.get_by_role("button", name="New conversation").click()
  send(page, "set")
  finished(page)
  request = server.engine.requests[-1]
  assert bytes(request.prompt) == b"system: be brief\nuser: set"
  assert (request.sampling.temperature, request.max_new, request.seed) == (0.25, 3, 11)
  assert request.stop == ("zz", "yy") and request.logprobs is None
  assert "limit of tokens" in page.locator("article.assistant .foot").inner_text()
  picture(page, "settings")


def test_stop_keeps_what_is_there_and_frees_the_engine(serve, visit):
  server = serve(fake.FakeEngine(seconds=0.02))
  page = visit(server.url)
  for way in (
    lambda: page.get_by_role("button", name="Stop").click(),
    lambda: page.keyboard.press("Escape"),
  ):
    send(page, "tokens=4000")
    page.locator("article.assistant").last.locator("[data-t]").nth(3).wait_for()
    before = len(server.engine.cancelled)
    way()
    assert finished(page).startswith(f"{fake.script(b'user: tokens=4000')[0]}") or before
    assert "stopped" in page.locator("article.assistant .foot").last.inner_text()
    for _ in range(100):  # the page says so at once, the server when it notices
      if len(server.engine.cancelled) > before:
        break
      page.wait_for_timeout(50)
    assert len(server.engine.cancelled) == before + 1


def test_a_text_goes_on(serve, visit):
  page = visit(serve(chats=False).url)
  page.get_by_text("was not trained on conversations").wait_for()
  page.get_by_label("Text to go on with").fill("Once")
  page.keyboard.press("Enter")
  page.get_by_role("button", name="Go on").wait_for()
  text = page.locator("article .body").inner_text()
  assert text.strip() == ("Once" + "".join(fake.script(b"Once"))).strip()
  page.get_by_role("button", name="Go on").click()
  page.get_by_role("button", name="Go on").wait_for()
  assert page.locator("article .body").inner_text().startswith(text.strip())


def test_errors_are_shown(serve, visit):
  server = serve(settings=app.Settings(api_key="k"))
  page = visit(server.url)
  page.get_by_text("asks for an API key").wait_for()
  page.get_by_label("API key").fill("k")
  page.keyboard.press("Tab")
  page.get_by_text("Talk to fake").wait_for()
  send(page, "fails")
  assert "no block is free" in page.get_by_role("alert").inner_text()
  send(page, "x" * 5000)
  page.get_by_text("shorten it by").wait_for()
  server.end()
  send(page, "anyone there?")
  page.get_by_text("cannot be reached").wait_for()


def test_a_conversation_that_outgrows_the_context_leaves_out_its_beginning(serve, visit):
  page = visit(serve().url)
  send(page, "a" * 3000)
  finished(page)
  send(page, "b" * 3000)
  page.get_by_text("The first 2 messages no longer fit").wait_for()
  assert finished(page).strip() == want("b" * 3000).strip()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths_and_colours(serve, visit, width, scheme):
  page = visit(serve().url, viewport={"width": width, "height": 800}, color_scheme=scheme)
  send(page, "a long question " * 20 + "w" * 200)
  finished(page)
  scrolls = "document.documentElement.scrollWidth > innerWidth"
  assert not page.evaluate(scrolls), "the page is wider than the screen"
  luminance = (
    "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
  )
  assert (sum(page.evaluate(luminance)) < 200) == (scheme == "dark")
  unnamed = """[...document.querySelectorAll('button, input, textarea')].filter((node) =>
    !(node.labels?.length || node.getAttribute('aria-label') || node.textContent.trim())).length"""
  assert page.evaluate(unnamed) == 0
  page.get_by_role("button", name="Settings", exact=True).click()
  assert not page.evaluate(scrolls)
  picture(page, f"{scheme}-{width}")
  page.get_by_role("button", name="Close settings").click()
  page.get_by_role("button", name="Colours: as the system").click()
  assert sum(page.evaluate(luminance)) > 600, "light, whatever the system has"
