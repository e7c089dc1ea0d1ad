"""Commands that check, compare and repeat the runs in run folders."""
