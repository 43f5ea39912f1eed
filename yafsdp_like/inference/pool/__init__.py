"""Many models on one device or cut among several: asleep on the host, awake on slabs that weights and pages share."""
