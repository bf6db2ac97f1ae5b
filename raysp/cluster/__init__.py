"""Ray: the only room that imports it. Workers, the group of them, the driver of a run, job submission."""
