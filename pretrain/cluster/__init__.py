"""Slurm: what runs inside a job, what submits and follows jobs, and what tells whether nodes are sound."""
