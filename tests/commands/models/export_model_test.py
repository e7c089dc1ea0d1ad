"""`jaxgpt export` fails if its certificate is bad, after it has said what it wrote."""

import pytest

from jaxgpt.commands.actions import backend, import_export
from jaxgpt.commands.models import export_model
from jaxgpt.errors import UserError

FIGURE = {"max_abs": 0.39, "mean_abs": 0.1, "scale": 4.0}
CERTIFICATE = {
  "checked": True,
  "tokenizer": {"equal": True, "why_not": ""},
  "versions": {"transformers": "5"},
  "logits": FIGURE,
  "layers": [FIGURE],
}
RAISED = {
  "checked": False,
  "failed": True,
  "why_not": "transformers raised KeyError: 'x'",
  "tokenizer": {"equal": None, "why_not": ""},
}


@pytest.mark.parametrize(
  "certificate,message",
  [
    (CERTIFICATE, r"--to=OUT: outputs differ .* 3.9e-01 of 4, .* The folder is kept"),
    (RAISED, r"--to=OUT: transformers raised KeyError: 'x'. The folder is kept"),
  ],
)
def test_a_bad_certificate_is_an_error(certificate, message, monkeypatch, capsys):
  done = import_export.Exported("bert", ["model.safetensors"], certificate)
  monkeypatch.setattr(import_export, "export_run", lambda *args, **kwargs: done)
  monkeypatch.setattr(backend, "start", lambda: None)
  with pytest.raises(UserError, match=message) as e:
    export_model.run(export_model.ExportOptions(workdir="RUN", to="OUT"))
  assert e.value.exit_code == 2
  assert "wrote OUT (bert, float32): model.safetensors" in capsys.readouterr().out


def test_a_check_that_is_not_possible_is_none(monkeypatch, capsys):
  certificate = {"checked": False, "why_not": "not installed", "tokenizer": RAISED["tokenizer"]}
  done = import_export.Exported("bert", [], certificate)
  monkeypatch.setattr(import_export, "export_run", lambda *args, **kwargs: done)
  monkeypatch.setattr(backend, "start", lambda: None)
  export_model.run(export_model.ExportOptions(workdir="RUN", to="OUT"))
  assert "not checked against transformers: not installed" in capsys.readouterr().out
