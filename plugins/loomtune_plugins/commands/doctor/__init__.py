"""`loomtune doctor`: is this cluster sane, asked from every node before a large run.

command: the words, the start through a launcher, and what is printed. rank: what each rank runs. phases: the course of
an examination, each step bounded in time. board: what ranks tell rank 0, whatever the network does. facts, graphics,
disks, seeing, clocks, collectives, pairs: what is measured. machines, cluster: what is wrong with it, and the cures.
report: the answer as a file. shown: as a table.
"""
