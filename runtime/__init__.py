"""What runs between the sampler and the compiled pieces: which step this is, what is cached, what is decided.

trajectory.py  trajectories and their streams, told or watched
inputs.py      which inputs of a denoiser are latent, timestep and conditioning
cache.py       slots of one graph's occurrence, with stamps
measure.py     how much what guards read has changed
decide.py      the decision machine: a pure function
session.py     the state of one thread: its trajectory and its call
dispatch.py    decisions -> pieces -> call
stats.py       what was counted
"""
