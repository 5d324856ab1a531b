"""The report of an experiment, built from run folders alone."""
