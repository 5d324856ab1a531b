"""Slurm: what runs inside a job, what submits and follows jobs, and what examines nodes and machines."""
