"""What a run folder says about how the run was made, and whether that is still what was written."""
