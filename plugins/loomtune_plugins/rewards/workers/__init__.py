"""Processes in which code that nobody vouches for scores answers: it may hang, crash and grow without harm to the run.

They keep accidents apart from the run and are no jail: what runs there may do whatever the user may.
"""
