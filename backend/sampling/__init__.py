"""Samplers: noise, schedules, and the loops between. `catalog` is the part that imports no torch."""
