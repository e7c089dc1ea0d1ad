"""Block sizes of attention kernels: `measured` has the schedules, `choose` picks by them."""
