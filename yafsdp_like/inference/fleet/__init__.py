"""Which model of many runs next, how much of it, and on which device: plain numbers, no clock and no torch."""
