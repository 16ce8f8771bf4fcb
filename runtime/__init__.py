"""The runtime between the sampler and the compiled segments: it finds the step, keeps the cache and makes decisions.

trajectory.py    explicit trajectories (marked by the caller) and inferred ones
clock.py         the step of a call in an explicit trajectory
schedule.py      a scheduler's timesteps, and the position of a call among them
noise.py         a scheduler's sigma and signal-to-noise ratio
streams.py       the stream of a trajectory that a call belongs to
conditioning.py  the conditioning of a stream, and which of its tensors vary from step to step
inputs.py        classification of a denoiser's inputs as latent, timestep and conditioning
tensors.py       identity, version and relative change of tensors
cache.py         the slots of one occurrence of a graph
measure.py       measurements that guards read
spectral.py      SeaCache's spectral filter of a measured tensor
decide.py        the decisions of a call, as a pure function
session.py       the state of one thread: its trajectory and its current call
step_tables.py   the step tables of a graph
prologue.py      the hoisted values of a graph
segments.py      compiled segments and the wires between them
dispatch.py      runs the segments of a graph by the decisions
stats.py         counters
"""
