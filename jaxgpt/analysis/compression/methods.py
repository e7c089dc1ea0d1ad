"""Names of the methods of compression. Commands read them before the heavy imports."""

from jaxgpt.errors import UserError

PRUNING = ("magnitude", "wanda", "sparsegpt")
STRUCTURED = ("layers", "heads", "columns")
ROUNDING = ("nearest", "gptq", "awq")
CALIBRATED = ("wanda", "sparsegpt", *STRUCTURED, "gptq", "awq")  # they read calibration text
# Weights that are compared with one another, the usual choice first: those of an output, of each
# matrix of a layer, or of all matrices.
SCOPES = {"magnitude": ("layer", "global"), "wanda": ("output", "layer")}
ROWS = 128  # of calibration text, as in the papers


class UnsuitableError(UserError):
  """A method does not suit a model, whatever the text.

  Attributes:
    reason: Why, without options and the way out.
  """

  def __init__(self, option: str, reason: str, way_out: str):
    super().__init__(f"{option}: {reason}; {way_out}")
    self.reason = reason
