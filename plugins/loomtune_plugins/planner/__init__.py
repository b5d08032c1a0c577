"""What a run will take before anybody pays for it: memory, bytes on the wire, operations, time and money.

`trace` is what a rehearsal saw of one step; everything else is arithmetic over it and over `hardware` data.
"""
