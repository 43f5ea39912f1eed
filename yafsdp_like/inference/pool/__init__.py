"""Many models on one device or cut among several: asleep in host memory, awake on slabs that weights and pages share."""
