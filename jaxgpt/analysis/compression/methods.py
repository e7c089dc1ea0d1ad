"""Names of the methods of compression. Commands read them before the heavy imports."""

PRUNING = ("magnitude", "wanda", "sparsegpt")
STRUCTURED = ("layers", "heads", "columns")
ROUNDING = ("nearest", "gptq", "awq")
CALIBRATED = ("wanda", "sparsegpt", *STRUCTURED, "gptq", "awq")  # they read calibration text
SCOPES = ("layer", "global")
ROWS = 128  # of calibration text, as in the papers
