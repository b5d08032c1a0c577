"""`loomtune prepare`: from raw files to rows that can be trusted.

command: the words and what is printed. composition: from words to a `Job`. flow: the phases in their order. reading,
refining, meeting, deciding: the tasks, each a pure function from files to files. tasks: carrying one out, wherever that
is. engines: where. parts: rows on disk. counts, manifest: what is told of it. folder: where it ends.
"""
