"""The page of runs: what is on it, that it loads nothing, and a click-through in Chromium."""

import base64
import hashlib
import importlib.resources
import json
import os
import re
import shutil

import pytest

from jaxgpt.analysis import report
from jaxgpt.analysis.report import collect, page, tags
from jaxgpt.commands import main
from jaxgpt.errors import UserError


@pytest.fixture(scope="module")
def runs(trained, other_trained):
  found = collect.runs([trained, other_trained])
  origin = dict.fromkeys(found[0].flat, "base") | {"optim.lr": "command line"}
  return [run._replace(origin=origin) for run in found]


@pytest.fixture(scope="module")
def text(runs):
  return page.make(runs, title="Two <b>runs</b>")


def figures(text):
  return re.findall(r'<figure id="[^"]*" data-metric="([^"]*)"', text)


def test_what_a_run_left_is_collected(runs):
  first, second = runs
  assert (first.row.status, first.row.step, second.row.step) == ("done", 8, 4)
  assert first.marks == {"starts": [0], "saves": [4, 8], "evaluations": [4, 8]}
  assert first.data.folders[0].card["kind"] == "text" and not first.data.notes
  assert first.account.goodput > 0 and not first.damages
  assert len(first.series["train"].last) == 8
  changed = [change.key for change in second.difference.config]
  assert first.difference is None and changed == ["optim.lr", "train.steps"]


def test_the_page_loads_nothing(text):
  assert not re.findall(r"""(?:src|href|action)=["']?(?!data:|#)[^"'\s>]+""", text)
  assert not re.findall(
    r"@import|innerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", text
  )
  (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
  policy = policy.replace("&#x27;", "'")
  assert policy.startswith("default-src 'none';") and "unsafe" not in policy
  for tag_name, name in (("script", "script-src"), ("style", "style-src")):
    (own,) = re.findall(rf"<{tag_name}>(.*?)</{tag_name}>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"{name} 'sha256-{digest}'" in policy
  assert "style=" not in re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.S)


def test_every_logged_metric_has_a_chart_and_every_key_a_row(text, runs):
  logged = {name for run in runs for s in run.series.values() for name in s.metrics}
  assert set(figures(text)) == logged - {"tokens"}
  assert figures(text)[:4] == ["loss", "lr", "grad_norm", "tokens_per_second"]
  assert "host_memory" in figures(text)[:6]  # those that are not folded
  for key in ("optim.lr", "data.path", "model.num_layers"):
    assert f'<th scope="row">{key}</th>' in text
  assert "Documents dropped, by rule" in text or "No document was dropped" in text
  assert '<th scope="row">optim.lr</th><td><code>0.01</code></td><td><code>0.02</code></td>' in text


def test_texts_of_runs_are_no_html(text):
  assert "<title>Two &lt;b&gt;runs&lt;/b&gt; · jaxgpt report</title>" in text
  assert tags.tag("p", 'a<"', title='b"') == '<p title="b&quot;">a&lt;&quot;</p>'


def test_data_in_the_page_cannot_end_its_element(runs):
  named = [runs[0]._replace(name="</script><script>alert(1)</script>")]
  made = page.make(named)
  assert made.count("</script>") == 2 and "alert(1)" in made


def test_a_page_that_would_be_too_large_is_refused(runs, monkeypatch):
  monkeypatch.setattr(page, "MOST_BYTES", 10_000)
  with pytest.raises(UserError, match=r"the report of 2 runs would have 0\.\d MB"):
    page.make(runs)


def test_names_are_what_the_paths_do_not_share():
  names = lambda *paths: collect._names(list(paths))
  assert names("runs/a/run", "runs/b/run") == ["a", "b"]
  assert names("runs/a") == ["runs/a"]
  assert names("runs/a", "runs/a/b") == ["runs/a", "runs/a/b"]


def test_the_command_writes_the_page(trained, tmp_path, capsys):
  moved = tmp_path / "run"
  shutil.copytree(trained, moved)
  shutil.rmtree(moved / "checkpoints")  # a report needs none, and says that they are gone
  given = tmp_path / "test.json"
  given.write_text(json.dumps({"split": "test", "step": 8, "loss": 2.5}))
  out = tmp_path / "report.html"
  code = main.main(["report", str(moved), f"--out={out}", f"--results={given}"])
  assert not code and "report.html: 1 run, " in capsys.readouterr().out
  made = out.read_text()
  assert "its checkpoints are gone" in made and "test.json: test at step 8" in made
  assert main.main(["report", str(tmp_path / "nothing"), f"--out={out}"]) == 2
  assert "holds no run" in capsys.readouterr().err


def contrast(first, second):
  """The contrast ratio of two colors (WCAG 2.2)."""

  def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b

  high, low = sorted((luminance(first), luminance(second)), reverse=True)
  return (high + 0.05) / (low + 0.05)


def test_colors_have_contrast():
  css = importlib.resources.files(report).joinpath("page.css").read_text()
  both = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", css)
  assert len(both) >= 19
  for theme in (1, 2):
    color = {declaration[0]: declaration[theme] for declaration in both}
    for back in ("back", "panel"):
      for name in ("text", "dim", "accent"):
        assert contrast(color[name], color[back]) >= 4.5, (name, back)
    assert contrast(color["bad"], color["bad-back"]) >= 4.5
    assert contrast(color["accent"], color["soft"]) >= 4.5
    assert contrast(color["text"], color["soft"]) >= 4.5
    for n in range(10):
      assert contrast(color[f"c{n}"], color["panel"]) >= 3, n


def test_a_click_through(browser, text, tmp_path):
  from playwright import sync_api  # the fixture has skipped the test where it is missing

  file = tmp_path / "report.html"
  file.write_text(text)
  context = browser.new_context(viewport={"width": 1200, "height": 900})
  view, errors = context.new_page(), []
  view.on("pageerror", lambda error: errors.append(str(error)))
  view.on("console", lambda message: errors.append(message.text))
  view.on(
    "request",
    lambda r: r.url.startswith((file.as_uri(), "data:")) or errors.append(r.url),
  )
  view.goto(file.as_uri())
  view.locator("#curves summary", has_text="more metrics").click()
  for metric in figures(text):
    plot = view.locator(f'figure[data-metric="{metric}"] .plot')
    plot.scroll_into_view_if_needed()
    plot.locator("path.line, circle.lone").first.wait_for(state="attached")
  plot = view.locator('figure[data-metric="loss"] .plot')
  plot.scroll_into_view_if_needed()
  assert plot.locator("path.line").count() == 4  # training and validation of two runs
  assert "from" in plot.get_attribute("aria-label")

  box = plot.bounding_box()  # drag to zoom: all charts follow
  view.mouse.move(box["x"] + 200, box["y"] + 60)
  assert view.locator("#tip").inner_text().startswith("step ")
  view.mouse.down()
  view.mouse.move(box["x"] + 330, box["y"] + 60)
  view.mouse.up()
  assert view.evaluate("state.zoom !== null") and view.locator("#reset").is_enabled()
  plot.press("0")
  assert view.evaluate("state.zoom === null")
  plot.press("ArrowRight")
  assert "Loss, step" in view.locator("#said").inner_text()

  view.locator("#legend button").first.click()
  # Polled from here: the page's security policy forbids the eval of wait_for_function.
  sync_api.expect(plot.locator("path.line")).to_have_count(2)
  head = view.locator("#summary thead button", has_text="loss").first
  head.click()
  head.click()
  assert view.locator("#summary thead th[aria-sort]").get_attribute("aria-sort") == "descending"
  rows = view.locator("#config tbody tr:visible")
  few = rows.count()
  view.locator("#config .all-keys").first.check()
  assert 0 < few < rows.count()
  view.set_viewport_size({"width": 390, "height": 800})
  assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
  if folder := os.environ.get("JAXGPT_SCREENSHOTS"):
    view.screenshot(path=os.path.join(folder, "report.png"), full_page=True)
  context.close()
  assert not errors
