"""The fault suite: real processes, a real PostgreSQL, faults from outside, and one checker.

`python -m tests.chaos --help` from the top of the repository, or `make chaos`.
"""
