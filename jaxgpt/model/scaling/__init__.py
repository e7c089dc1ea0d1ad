"""Rules by which initial weights, rates and multipliers change with the size of a model.

`mup` has the rule for the width (muP) and for the depth (CompleteP).
"""
