"""Commands that train many small models: sweeps, and the check that their settings transfer."""
